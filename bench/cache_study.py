"""What the cache of keys and values is worth: `trillama bench --cache-study` generates the same tokens with it and without.

Without a cache each token is the work of a whole prefill, so its time grows with the text; with one it is the time of reading the
weights, and of reading a cache that grows slowly.
"""

import statistics

import torch

from ..model import generate


def study(model, prompt, new, clock):
    """Generates `new` tokens after `prompt` random ones, greedily, both ways. The same tokens are expected: in float32 they are,
    in low precision rounding may decide otherwise between two that are nearly as likely.

    clock: a function of a device that makes a `Clock`. Returns times in seconds, of every token, and how many tokens agree.
    """
    device = model.lm_head.weight.device
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    for use_cache in (True, False):  # what is done once, is done before the clock runs
        generate(model, ids, max_new_tokens=2, eos=[], use_cache=use_cache)
    report = {"prompt": prompt, "new": new}
    texts = {}
    for name, use_cache in (("with", True), ("without", False)):
        ticks = clock(device)
        texts[name] = generate(model, ids, max_new_tokens=new, eos=[], use_cache=use_cache, stream=ticks.tick)[0].tolist()
        steps = ticks.intervals()
        quarter = max(1, len(steps) // 4)
        report[name] = {
            "seconds": sum(steps),
            "tokens_per_second": new / sum(steps),
            "first_steps_ms": statistics.median(steps[1 : 1 + quarter]) * 1e3,
            "last_steps_ms": statistics.median(steps[-quarter:]) * 1e3,
            "step_seconds": steps,
        }
    pairs = enumerate(zip(texts["with"], texts["without"]))
    report["same_tokens"] = next((i for i, (a, b) in pairs if a != b), new)
    report["ratio"] = report["without"]["seconds"] / report["with"]["seconds"]
    report["ids"] = texts["with"]
    return report


def show(report):
    print(f"{report['new']} tokens after {report['prompt']}, batch 1, greedy\n")
    print("cache    |  seconds  tokens/s | ms a token, first quarter  last quarter")
    for name in ("with", "without"):
        r = report[name]
        speeds = f"{r['seconds']:8.2f} {r['tokens_per_second']:9.1f}"
        print(f"{name:8s} | {speeds} | {r['first_steps_ms']:24.1f} {r['last_steps_ms']:13.1f}")
    same = "the same tokens" if report["same_tokens"] == report["new"] else f"the first {report['same_tokens']} tokens the same"
    print(f"\nwithout the cache it takes {report['ratio']:.1f} times as long; {same}", flush=True)
