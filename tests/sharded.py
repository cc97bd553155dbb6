"""Two gloo processes: FSDP2 shards a live model by block, trains it, and rank 0 writes what came out. Run by test_live.py."""

import copy
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import build, example
from torch.distributed.fsdp import fully_shard

from rewrite.capture.model import capture
from rewrite.emit.live import make_live


def inputs(batch=4, length=5):
    ids = example("llama", batch, length)
    return {**ids, "position_ids": torch.arange(length).expand(batch, length)}


def train(model, batches, steps=3):
    """Steps of AdamW on the mean of squared logits: the logits of the whole batch afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        _logits(model(**batches)).pow(2).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return _logits(model(**batches))


def _logits(out):
    return out if isinstance(out, torch.Tensor) else out.logits


def work(rank, store, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    live = make_live(capture(build("llama")))
    alone = train(copy.deepcopy(live), inputs())
    for block in live.model.layers:
        fully_shard(block)
    fully_shard(live)
    sharded = {name for name, p in live.named_parameters() if isinstance(p, torch.distributed.tensor.DTensor)}
    whole = inputs()
    together = train(live, {k: v[rank * 2 : rank * 2 + 2] for k, v in whole.items()})
    gathered = [torch.empty_like(together) for _ in range(2)]
    dist.all_gather(gathered, together)
    if rank == 0:
        torch.save({"alone": alone, "together": torch.cat(gathered), "sharded": len(sharded), "all": len(list(live.parameters()))}, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=tuple(sys.argv[1:3]), nprocs=2)
