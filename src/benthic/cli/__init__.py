"""Words to calls: parse, resolve, print."""
