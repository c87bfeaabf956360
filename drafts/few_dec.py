"""Decode of few sequences, padded or not: python few_dec.py"""
import sys; sys.path.insert(0, "benchmarks")
import serve_gpu, torch
from benthic.spec import presets
sizes = serve_gpu.Sizes(presets.get("moonlight-16b-a3b"), "cuda", prompts=((1, 128),), batches=(1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24), beside=(), steps=64, repeats=1, budget=1024)
real = serve_gpu.EngineOptions
serve_gpu.EngineOptions = lambda **k: real(**{**k, "cudagraph_capture_sizes": (1, 2, 4, 8, 16, 24)})
roofs = {"copy_bytes_per_second": 4.2e12, "product_flops": 787e12}
for r in serve_gpu.our_rows(sizes, "bf16", roofs):
    if r.get("what") == "decode": print("DEC", r["batch"], round(r["step_ms"], 3), round(r.get("gpu_ms") or 0, 3), flush=True)
