"""`endside plan CONFIG`: what a run would take of memory and time on N devices, before it starts.

CONFIG is the TOML of a run, or a preset name such as minicpm4-8b (bfloat16, 4096 tokens a row, 8
rows). What a device does is measured where it is this machine's processor, with the shapes of the
run (`train.rates`); for a GPU it is what the flags say, else what is assumed of an H100, and the
report says so. Nothing is trained or read. How time and bytes come about: `train.forecast`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from endside.errors import UserError
from endside.verbs import parse

if TYPE_CHECKING:
    from endside.train.forecast import Device, Work
    from endside.train.pretrain import PretrainConfig

GIB = 1 << 30
# An H100 with 80 GB: large bfloat16 products reach about two thirds of the maker's 989 TFLOPS,
# attention, whose products are smaller and have a softmax between them, half of that.
ASSUMED = {
    "memory": 80e9, "flops": 600e12, "attention": 300e12, "memory_rate": 2500e9,
    "link_rate": 200e9,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Forecast bytes per device and seconds per step of a training run."""

    config: Positional[str]
    """TOML file of a run, or a preset such as minicpm4-0.5b."""
    overrides: Positional[tuple[str, ...]] = ()
    """key=value pairs that win over the file, such as parallel.shard=fsdp."""
    devices: int = 1
    """How many devices train, one process each."""
    device_memory: float | None = None
    """GiB of one device."""
    tflops: float | None = None
    """What the model's matrix products reach on one device, in TFLOPS."""
    attention_tflops: float | None = None
    """What attention reaches, forward and backward; where only --tflops is given, half of that."""
    memory_bandwidth: float | None = None
    """GB/s between a device and its own memory."""
    bandwidth: float | None = None
    """GB/s between devices, each way."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> None:
    """Print the forecast."""
    flags = parse(Plan, argv, "plan")
    report = forecast(flags)
    print(json.dumps(report, indent=1) if flags.json else _table(report))


def forecast(flags: Plan) -> dict[str, Any]:
    """The whole report as plain values."""
    from endside.model.flops import parameters, training_flops
    from endside.train import forecast as made

    cfg = _read(flags)
    work = work_of(cfg)
    device, source = _device(flags, cfg)
    _check(work, flags.devices)
    taken, spent = made.memory(work, device.count), made.time(work, device)
    tokens = work.batch * work.accumulate * work.seq_len
    useful = tokens * training_flops(work.model, work.seq_len) / device.count
    fits = made.fits(work, device)
    return {
        "config": flags.config,
        "parameters": parameters(work.model).total,
        "run": {**asdict(replace(work.parallel)), "batch": work.batch, "seq_len": work.seq_len,
                "accumulate": work.accumulate, "bf16": work.bf16, "recompute": work.recompute,
                "chunk": work.chunk},
        "device": {**asdict(device), "source": source},
        "bytes": {**_parts(taken), "peak": taken.peak},
        "seconds": {**asdict(spent), "step": spent.step},
        "tokens_per_s": tokens / spent.step,
        "mfu_of_products": useful / spent.step / device.flops,
        "days": cfg.steps * spent.step / 86400,
        "fits": fits,
        "remedy": None if fits else _remedy(work, device),
    }  # fmt: skip


def _read(flags: Plan) -> PretrainConfig:
    from endside import config as configuration
    from endside.model.presets import PRESETS
    from endside.train import pretrain

    if flags.config not in PRESETS:
        return pretrain.read_config(flags.config, flags.overrides)
    data = configuration.override(
        {
            "model": {"preset": flags.config}, "data": {"shards": "unread"}, "steps": 1000,
            "precision": "bfloat16", "device": "cuda", "batch": 8,
        },
        flags.overrides,
    )  # fmt: skip
    data["model"] = pretrain.model_table(data["model"])
    data.setdefault("seq_len", min(4096, data["model"]["max_position_embeddings"]))
    return configuration.build(pretrain.PretrainConfig, data, source=flags.config)


def work_of(cfg: PretrainConfig) -> Work:
    """What the forecast reads of a run's configuration."""
    from endside.train import pretrain
    from endside.train.forecast import Work

    return Work(
        pretrain.shape(cfg),
        batch=cfg.batch,
        seq_len=cfg.seq_len,
        accumulate=cfg.accumulate,
        bf16=cfg.precision != "float32",
        recompute=cfg.checkpoint_activations,
        chunk=cfg.loss.chunk,
        parallel=cfg.parallel,
    )


def _device(flags: Plan, cfg: PretrainConfig) -> tuple[Device, str]:
    from endside import native
    from endside.train.forecast import RESERVE, RESERVE_CPU, Device

    if flags.devices < 1:
        raise UserError(f"--devices is {flags.devices}: at least one device trains")
    given = {
        "memory": flags.device_memory and flags.device_memory * GIB,
        "flops": flags.tflops and flags.tflops * 1e12,
        "attention": _attention(flags),
        "memory_rate": flags.memory_bandwidth and flags.memory_bandwidth * 1e9,
        "link_rate": flags.bandwidth and flags.bandwidth * 1e9,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if any(value <= 0 for value in given.values()):
        raise UserError("--device-memory, both rates and both bandwidths must be above 0")
    missing = [name for name in ASSUMED if name not in given]
    if not missing:
        return Device(flags.devices, **given), "given"
    here = cfg.device == "cpu"
    if here:
        known, source = this_machine(cfg, flags.devices), "measured here"
    else:
        known, source = ASSUMED, "assumed of an H100"
    core, reserve = here and native.load() is not None, RESERVE_CPU if here else RESERVE
    device = Device(flags.devices, **{**known, **given}, core=core, reserve=reserve)
    return device, f"{source}: {', '.join(missing)}"


def _attention(flags: Plan) -> float | None:
    given = flags.attention_tflops or (flags.tflops and flags.tflops / 2)
    return given and given * 1e12


def this_machine(cfg: PretrainConfig, processes: int = 1) -> dict[str, float]:
    """What one of `processes` gets of this machine's processor and memory."""
    from endside.train import rates

    found = rates.measure(work_of(cfg), cfg.precision)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Processes of one machine hand messages over through its memory, in and out.
    return {
        "memory": machine / processes,
        "flops": found.products / processes,
        "attention": found.attention / processes,
        "memory_rate": found.memory / processes,
        "link_rate": found.memory / processes / 2,
    }


def _check(work: Work, devices: int) -> None:
    from endside.dist import World
    from endside.train.parallel import check_shares

    check_shares(work.parallel, World(0, devices), work.batch)
    if work.parallel.tensor > 1:
        from endside.train.parallel import check_split

        check_split(work.model, work.parallel.tensor)


def _parts(taken: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in asdict(taken).items()
        if name not in ("accumulating", "block")
    }


def _remedy(work: Work, device: Device) -> dict[str, Any] | None:
    from endside.train import forecast as made

    found = made.remedy(work, device)
    if found is None:
        return None
    changes, changed, larger = found
    return {"changes": changes, "peak": made.memory(changed, larger.count).peak,
            "step": made.time(changed, larger).step}  # fmt: skip


def _table(report: dict[str, Any]) -> str:
    run, device, spent = report["run"], report["device"], report["seconds"]
    lines = [
        f"{report['config']}: {report['parameters'] / 1e9:.3g} B parameters; {run['batch']} rows x "
        f"{run['seq_len']} tokens x {run['accumulate']} batches a step, "
        f"{'bfloat16' if run['bf16'] else 'float32'}, {run['shard']}, tensor {run['tensor']}",
        f"{device['count']} device(s): {device['memory'] / GIB:.1f} GiB, "
        f"{device['flops'] / 1e12:.3g} TFLOPS, attention {device['attention'] / 1e12:.3g}, "
        f"memory {device['memory_rate'] / 1e9:.3g} GB/s, "
        f"links {device['link_rate'] / 1e9:.3g} GB/s ({device['source']})",
        "",
        "GiB on each device",
    ]
    lines += [f"  {name:<12}{value / GIB:9.2f}" for name, value in report["bytes"].items() if value]
    lines += [
        "",
        f"step {spent['step']:.3g} s: products {spent['products']:.3g}, attention "
        f"{spent['attention']:.3g}, memory {spent['memory']:.3g}, messages beside them "
        f"{spent['hidden']:.3g}, waited for {spent['exposed']:.3g}",
        f"{report['tokens_per_s']:,.0f} tokens/s, {report['mfu_of_products']:.0%} of what products "
        f"reach; {report['days']:.3g} days for the run",
        _verdict(report),
    ]
    return "\n".join(lines)


def _verdict(report: dict[str, Any]) -> str:
    if report["fits"]:
        return "It fits."
    remedy = report["remedy"]
    if remedy is None:
        return "It does not fit, and no number of devices up to 4096 times as many makes it fit."
    return (
        "It does not fit. These changes together make it fit "
        f"({remedy['peak'] / GIB:.1f} GiB, {remedy['step']:.3g} s a step): "
        + "; ".join(remedy["changes"])
    )
