"""Pipeline schedules as tables: built once, then checked, simulated, drawn and executed from one value."""
