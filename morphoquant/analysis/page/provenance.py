"""Where a run's numbers come from, and whether its own tables still give them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from morphoquant.analysis.page.gather import Run
from morphoquant.tracking.differences import ABOUT
from morphoquant.tracking.fingerprint import fingerprint
from morphoquant.tracking.rundir import IDENTITY, RESULT

CLOSE = 1e-6
FULL_BITS = 16.0


@dataclass(frozen=True)
class Check:
    """A claim of a run, computed again from its directory."""

    claim: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Linear:
    """One row of the manifest, in words."""

    name: str
    shape: str
    """Output x input features."""
    weight: str
    weight_bits: float
    activation: str
    activation_bits: float
    compensation: str
    calls: int
    tokens: int


def checks(run: Run) -> list[Check]:
    """Everything that a run's directory claims twice, compared.

    Fingerprint and question hash are recomputed, accuracies and unparsed answers counted again
    from the answers, effective bits and the calls of quantizers from the manifest.
    """
    result, samples, linears = run.result, run.samples, run.manifest["linears"]
    found = [
        _equal(f"the fingerprint is that of {IDENTITY}", result["fingerprint"], _identity(run)),
        _equal(
            "the question hash is that of the answered questions",
            result["question_ids"],
            fingerprint({"ids": sorted(set(samples["id"]))})[:16],
        ),
    ]
    for column, told in (("benchmark", result["accuracy"]), ("modality", result["modality"])):
        counted = samples.groupby(column)["correct"].agg(["mean", "size"])
        wrong = [
            name
            for name, row in told.items()
            if name not in counted.index
            or row["n"] != counted["size"][name]
            or not _close(row["value"], 100 * counted["mean"][name])
        ]
        values = ", ".join(
            f"{name} {row['value']:.2f} of n = {row['n']}" for name, row in told.items()
        )
        detail = f"not so: {', '.join(wrong)}" if wrong else values
        found.append(Check(f"accuracy by {column} is that of the answers", not wrong, detail))
    if result["accuracy"]:
        mean = sum(row["value"] for row in result["accuracy"].values()) / len(result["accuracy"])
        found.append(_equal("the mean is that of the benchmarks", result["mean"], mean))
    unparsed = sum(row["unparsed"] for row in result["accuracy"].values())
    found.append(
        _equal("unparsed answers are those counted", unparsed, int(samples["unparsed"].sum()))
    )
    found.append(
        _equal(
            "effective weight bits are the manifest's",
            result["bits"]["weight"],
            weight_bits(linears),
        )
    )
    found.append(
        _equal(
            "effective activation bits are the manifest's",
            result["bits"]["activation"],
            activation_bits(linears),
        )
    )
    if run.quantizes:
        idle = [linear["name"] for linear in linears if linear["calls"] == 0]
        calls = sum(linear["calls"] for linear in linears)
        told = f"{len(linears)} linears, {calls:,} calls"
        detail = f"never ran: {', '.join(idle)}" if idle else told
        found.append(Check("every linear in scope ran in evaluation", not idle, detail))
        leaked = result["calibration"]["leaked"]
        told = f"{leaked} prompts are in both" if leaked else "no prompt is in both"
        found.append(Check("calibration and evaluation are disjoint", not leaked, told))
    return found


def _identity(run: Run) -> str:
    return fingerprint({k: v for k, v in run.identity.items() if k != ABOUT})


def _equal(claim: str, told: Any, counted: Any) -> Check:
    if isinstance(told, float) or isinstance(counted, float):
        same = _close(float(told), float(counted))
        shown, other = f"{told:.4f}", f"{counted:.4f}"
    else:
        same, shown, other = told == counted, str(told), str(counted)
    detail = shown if same else f"{RESULT} says {shown}, the directory gives {other}"
    return Check(claim, same, detail)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=0, abs_tol=CLOSE)


def weight_bits(linears: Iterable[dict[str, Any]]) -> float:
    """Bits per weight in scope: the mean over linears by their size."""
    spent = [(r["in_features"] * r["out_features"], r["weight"]["effective_bits"]) for r in linears]
    return sum(n * bits for n, bits in spent) / max(sum(n for n, _ in spent), 1)


def activation_bits(linears: Iterable[dict[str, Any]]) -> float:
    """Bits per activation element that a linear read: each input once, by its traffic."""
    inputs: dict[tuple[str, str], tuple[float, float]] = {}
    for r in linears:
        place = (r["name"].rpartition(".")[0], r["group"])
        traffic = float(r["in_features"] * max(r["tokens"], 1))
        inputs.setdefault(place, (traffic, r["activation"]["effective_bits"]))
    return sum(n * bits for n, bits in inputs.values()) / max(sum(n for n, _ in inputs.values()), 1)


def linears(run: Run) -> list[Linear]:
    """The manifest as rows."""
    return [
        Linear(
            name=r["name"],
            shape=f"{r['out_features']} × {r['in_features']}",
            weight=_words(r["weight"]),
            weight_bits=r["weight"]["effective_bits"],
            activation=_words(r["activation"]),
            activation_bits=r["activation"]["effective_bits"],
            compensation=_compensation(r),
            calls=r["calls"],
            tokens=r["tokens"],
        )
        for r in run.manifest["linears"]
    ]


def _words(settings: dict[str, Any]) -> str:
    """``int4 per-token dynamic, minmax``; whatever the manifest names, in its order."""
    if settings["format"] == "none":
        return f"{settings['bits']}-bit float"
    digits = "" if any(c.isdigit() for c in settings["format"]) else str(settings["bits"])
    parts = [f"{settings['format']}{digits}"]
    parts += [str(settings[k]).replace("_", "-") for k in ("granularity", "mode") if k in settings]
    if "group_size" in settings and settings.get("granularity") == "per_group":
        parts.append(str(settings["group_size"]))
    known = {"format", "bits", "base_bits", "effective_bits", "granularity", "mode", "group_size"}
    others = [_word(k, v) for k, v in settings.items() if k not in known and v not in (None, False)]
    return ", ".join([" ".join(parts), *others])


def _word(name: str, value: Any) -> str:
    """A setting by its value where that says it, by its name where it is on, else by both."""
    if isinstance(value, str):
        return value
    name = name.replace("_", " ")
    if value is True:
        return name
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


def _compensation(record: dict[str, Any]) -> str:
    parts = []
    found = record["compensation"]
    if found:
        parts.append(str(found.get("name", "")))
        if "masked_channels" in found:
            parts.append(f"{found['masked_channels']} of {found['channels']} channels")
        if "bypass_rate" in found:
            parts.append(f"{100 * found['bypass_rate']:.2f} % of elements in 16 bits")
    if record["online_transform"]:
        parts.append(f"online {record['online_transform']}")
    return ", ".join(p for p in parts if p)


def config_text(run: Run) -> str:
    """The configuration that belongs to the fingerprint, as YAML."""
    return OmegaConf.to_yaml(run.identity["config"])


def hashes(run: Run) -> dict[str, str]:
    """What was hashed -> its hash: what makes the run this run."""
    git = (run.identity.get(ABOUT) or {}).get("git")
    commit = f"{git['commit']}{', changed since' if git['changed'] else ''}" if git else "not known"
    named = {
        "code": "code",
        "model": "model (weights and processor)",
        "calibration_ids": "calibration ids",
        "calibration_data": "calibration content",
        "question_ids": "question ids",
        "question_data": "question content",
    }
    told = {words: run.identity.get(key) or "not read" for key, words in named.items()}
    return {
        "fingerprint": run.result["fingerprint"],
        **told,
        "scope": run.result["scope"]["hash"],
        "git commit": commit,
    }


def facts(run: Run) -> dict[str, str]:
    """What was done, in words."""
    result, calibration = run.result, run.result["calibration"]
    asked = ", ".join(f"{name} {row['n']}" for name, row in result["accuracy"].items())
    scope = result["scope"]
    read = "none: this run reads none"
    if run.identity.get("calibration_ids"):
        read = (
            f"{calibration.get('name', '')}: {calibration['samples']} samples for statistics, "
            f"{calibration['search_samples']} others for the range search"
        )
    found = {
        "command": run.command or "not recorded (no sweep's note names this run)",
        **{f"slot: {name}": words for name, words in result["slots"].items()},
        "calibration": read,
        "questions": f"{len(run.samples)} ({asked})" if asked else "none asked",
        "scope": f"{', '.join(scope['towers'])}: {scope['linears']} linears",
        "seconds": ", ".join(f"{name} {s:.1f}" for name, s in result["seconds"].items()),
        "peak memory": ", ".join(
            f"{name} {mb:,.0f} MiB" for name, mb in result["peak_memory_mb"].items()
        ),
    }
    if result.get("transform_drift") is not None:
        found["rewrite moved logits by"] = f"{result['transform_drift']:.2e} relative"
    if result.get("logits"):
        moved = result["logits"]
        found["quantization moved logits by"] = (
            f"KL {moved['kl']:.4g} nats, top-1 agreement {100 * moved['top1_agreement']:.1f} % "
            f"(probe inputs)"
        )
    if result.get("held_out"):
        apart = result["held_out"]
        found["held-out prompts"] = (
            f"KL {apart['kl']:.4g} nats, top-1 agreement {100 * apart['top1_agreement']:.1f} % "
            f"({apart['samples']} prompts)"
        )
    costs = result.get("compensation") or {}
    if costs:
        found["compensation costs"] = (
            f"{100 * costs['masked_share']:.2f} % of channels masked, "
            f"{100 * costs['bypass_rate']:.2f} % of elements in 16 bits, "
            f"{100 * costs['extra_flops_share']:.2f} % more operations, "
            f"{costs['stored_numbers']:,} stored numbers"
        )
    if run.manifest.get("kv_cache"):
        found["keys and values"] = _words(run.manifest["kv_cache"])
    return found
