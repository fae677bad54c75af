"""PyTorch's attention over the full fp16 cache, shaped as in bench_cuda.cu: microseconds a layer.

python3 bench/peers.py [CSV of bench_cuda]   # with the CSV: also ratios to its rows
Each backend runs in a CUDA graph over layers whose caches lie apart in memory; median of replays.
FlashInfer is timed where it is installed.
"""
import csv
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def time_graph(layers, launch, replays):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(layers):
            launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(layers):
            launch(i)
    times = []
    for r in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if r >= 3:
            times.append(begin.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times)


def sdpa(backend, q, k, v):
    def launch(i):
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, k[i], v[i], enable_gqa=True)
    return launch


def flashinfer_decode(q, k, v):
    import flashinfer
    n = k[0].shape[2]
    keys = [x[0].transpose(0, 1).contiguous() for x in k]
    values = [x[0].transpose(0, 1).contiguous() for x in v]
    assert n == keys[0].shape[0]
    return lambda i: flashinfer.single_decode_with_kv_cache(q[0, :, 0], keys[i], values[i])


def main():
    ours = {}
    if len(sys.argv) > 1:
        with open(sys.argv[1]) as f:
            for row in csv.reader(f):
                if len(row) > 5 and row[5].replace(".", "", 1).isdigit():
                    ours[row[0]] = float(row[5])
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)
    for batch, tokens in ((1, 1024), (1, 4096), (1, 32768), (1, 131072), (8, 131072)):
        layers = 8 if batch * tokens > 1 << 18 else 32
        shape = (batch, 8, tokens, 128)
        k = [torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(layers)]
        v = [torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(layers)]
        q = torch.randn((batch, 32, 1, 128), device="cuda", dtype=torch.float16)
        peers = [("FlashAttention-2", sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)),
                 ("cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v))]
        if batch == 1:
            peers.append(("FlashInfer", None))
        for name, launch in peers:
            try:
                if launch is None:
                    launch = flashinfer_decode(q, k, v)
                us = time_graph(layers, launch, 50 if tokens * batch > 1 << 16 else 200)
            except Exception as e:  # a backend that is missing or refuses the shape
                print(f"{name:18s} batch {batch} T {tokens}: not run ({str(e)[:60]})")
                continue
            line = f"{name:18s} batch {batch} T {tokens:6d} {us:9.2f} us"
            for key in (f"dense, batch {batch}, tail {tokens}",
                        f"budget 1024, batch {batch}, tail 0",
                        f"budget 1024 +overlap, batch {batch}, tail 0"):
                if key in ours:
                    line += f"  | {key}: {ours[key]:.2f} us, {us / ours[key]:.2f}x"
            print(line, flush=True)
        del k, v


main()
