"""What an operation takes on a machine, and how sure that is (no torch).

    machine = machines.get("h800")
    one = price(Gemm(m=4096, n=7168, k=2048, dtype="fp8"), machine)  # seconds, low, high, provenance
    block = total([one, price(MemoryBound(name="rms_norm", bytes=2**28), machine)])  # and the coverage

`ops` says what can be priced, `machine` what it is priced on, `price` does it, `priced` adds up.
"""
