"""How fast does hand-written PyTorch train on several GPUs? Model and step are those of torch_best.py, which is no part of apr.

    python tools/ddp_peer.py --peers FOLDER --gpus 2 --row qwen2.5-0.5b:16x2048 [--kind fsdp2]

kind ddp: DistributedDataParallel, float32 gradients, compiled whole; fsdp2: fully_shard of every block, each compiled by itself.
Prints one JSON line with "ms", the slowest rank's median of a step. --go FILE: compile, and wait for the file before steps are
timed, so that the CPU's work is done while GPUs do other things. --play: gloo on the CPU, a tiny model: does this program run?
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any


def worker(rank: int, a: argparse.Namespace) -> None:
    """Measure as one of the ranks; rank 0 prints."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    sys.path.insert(0, a.peers)
    os.chdir(a.peers)
    import torch_best as best

    name, shape = a.row.split(":")[:2]
    batch, seq = map(int, shape.split("x"))
    assert name == "qwen2.5-0.5b", f"{name}: torch_best.py has one model"
    device = f"cuda:{rank}"
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(a.play)
    if a.play:
        device = "cpu"
        best.C, best.L, best.H, best.K, best.M, best.V, batch, seq = 128, 2, 2, 1, 256, 500, 2, 32
    else:
        torch.cuda.set_device(rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(a.port))
    dist.init_process_group("gloo" if a.play else "nccl", rank=rank, world_size=a.gpus)
    torch.manual_seed(0)
    model: Any = best.Net(seq).to(device)
    if a.kind == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.b:
            block.compile()
            fully_shard(block, mp_policy=mixed)
        fully_shard(model, mp_policy=mixed)
        step_of = model
    else:
        wrapped = model
        if a.gpus > 1:
            ids = None if a.play else [rank]
            wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        step_of = torch.compile(wrapped)
    fused = {} if a.play else {"fused": True}
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **fused)
    x, y = (torch.randint(0, best.V, (batch, seq), device=device) for _ in range(2))

    def step() -> Any:
        with torch.autocast(device.split(":")[0], torch.bfloat16) if a.kind == "ddp" else nullcontext():
            loss = step_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.detach()

    def wait() -> None:
        if not a.play:
            torch.cuda.synchronize()

    start = time.time()
    for _ in range(4):
        loss = step()
    wait()
    compiled = time.time() - start
    if a.go:
        # For what is measured meanwhile.
        if not a.play:
            torch.cuda.empty_cache()
        Path(f"{a.go}.ready{rank}").touch()
        while not Path(a.go).exists():
            time.sleep(0.05)
    for _ in range(3):
        step()
    times = []
    # Ends of steps, as a loop that logs would see them: nothing waits in between.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(a.steps + 1)] if not a.play else []
    wait()
    for n in range(a.steps + 1):
        loss = step()
        if marks:
            marks[n].record()
        else:
            times.append(1e3 * time.perf_counter())
    wait()
    ends = [marks[0].elapsed_time(m) for m in marks] if marks else times
    times = [b - a for a, b in pairwise(ends)]
    every: list[Any] = [None] * a.gpus
    dist.all_gather_object(every, statistics.median(times))
    ms = max(every)
    if rank == 0:
        version = "" if a.play else ".".join(map(str, torch.cuda.nccl.version()))
        peak = 0 if a.play else torch.cuda.max_memory_allocated() / 2**30
        found = {
            "peer": a.kind if a.gpus > 1 else "alone", "row": a.row, "gpus": a.gpus, "ms": round(ms, 3),
            "tokens_per_sec": round(a.gpus * batch * seq / ms * 1e3), "ms_all": [round(t, 2) for t in times],
            "peak_gib": round(peak, 2), "first_seconds": round(compiled, 1), "loss": round(float(loss), 3),
            "torch": torch.__version__, "nccl": version,
        }  # fmt: skip
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Start a process for each GPU."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", required=True, help="folder of torch_best.py")
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--row", default="qwen2.5-0.5b:16x2048")
    p.add_argument("--kind", default="ddp", choices=["ddp", "fsdp2"])
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--go", default="")
    p.add_argument("--port", type=int, default=29611)
    p.add_argument("--play", action="store_true")
    a = p.parse_args()
    import torch.multiprocessing

    if a.gpus == 1:
        worker(0, a)
    else:
        torch.multiprocessing.spawn(worker, (a,), a.gpus)


if __name__ == "__main__":
    main()
