"""The estimate as a reader wants it: what it takes first, then what would change that."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from deepen.cli.output import human_bytes, human_count

_STATES = {"below": "passed forward only", "frozen": "frozen", "trains": "that train"}
_FITS = {True: "fits", None: "may fit", False: "does not fit"}


def print_plan(facts: Mapping[str, Any]) -> None:
    """Print what `deepen.planner.report.plan_facts` found."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in (*_job(facts), *_memory(facts), *_cost(facts)):
        console.print(line)
    console.print(_levers(facts["levers"], facts))
    if facts["devices"]:
        console.print(_devices(facts["devices"]))
    else:
        console.print("for a GPU say --device h100, rtx4090, …")
    for line in _paper(facts["paper"], facts):
        console.print(line)


def _job(facts: Mapping[str, Any]) -> list[str]:
    job, counts, flops = facts["job"], facts["parameters"], facts["flops_per_token"]
    share = flops["total"] / flops["full_finetune"]
    shares = f"{job['devices']} × " if job["devices"] > 1 else ""
    cut = ", model cut over them" if job["cut_over_devices"] else ""
    again = f"; {len(job['computed_again'])} blocks computed again" if job["computed_again"] else ""
    beside = "".join(
        f", {flops[name] / 1e9:.4g} for the {name}" for name in ("anchor", "teacher") if flops[name]
    )
    return [
        f"{facts['model']}: {job['method']}, {job['precision']}, on {shares}{job['device']}{cut}",
        f"layout      {job['layout'] or 'the base as it is'}",
        f"parameters  {human_count(counts['base'])} base + {human_count(counts['new'])} new; "
        f"{human_count(counts['trainable'])} train",
        f"compute     {flops['total'] / 1e9:.4g} GFLOP a token ({flops['forward'] / 1e9:.4g} forward, "
        f"{flops['backward'] / 1e9:.4g} backward{beside}), {share:.2f} × full fine-tuning{again}",
        f"step        {job['windows_per_step']} windows × {job['sequence']} tokens, "
        f"{job['micro_batch']} a forward pass",
    ]


def _memory(facts: Mapping[str, Any]) -> list[str]:
    memory, disk = facts["memory_bytes"], facts["disk_bytes"]
    parts = " + ".join(
        f"{human_bytes(memory[name])} {name}" for name in ("weights", "gradients", "optimizer", "activations")
    )
    return [
        f"memory      {human_bytes(memory['total'])} = {parts}",
        f"            a device needs {human_bytes(memory['low'])} to {human_bytes(memory['high'])}, likely "
        f"{human_bytes(memory['expected'])}; it has {human_bytes(memory['device'])}: {_FITS[facts['fits']]}",
        f"            largest micro-batch that likely fits: {facts['largest_micro_batch']}",
        f"disk        {human_bytes(disk['checkpoints'])} of checkpoints while it trains, "
        f"{human_bytes(disk['output'])} saved ({human_bytes(disk['merged'])} merged)",
    ]


def _cost(facts: Mapping[str, Any]) -> list[str]:
    cost, basis = facts["cost"], facts["basis"]
    rate = cost["tokens_per_second"]
    lines = [f"speed       {_span(rate, '{:,.0f}')} tokens/s; by {basis['time']}"]
    if facts["measured"]:
        lines.append(f"            {_measured(facts['measured'])}")
    if cost["seconds"]:
        tokens = human_count(cost["tokens"])
        lines.append(f"time        {_hours(cost['seconds'])} for {tokens} tokens; scoring texts comes on top")
        lines.append(f"energy      {_span(cost['kilowatt_hours'], '{:,.3g}')} kWh at {basis['watts']:g} W")
    if cost["dollars"]:
        assumed = f", assumed {basis['price_assumed']}" if basis["price_assumed"] else ""
        price = f"${basis['dollars_per_hour']:g} an hour{assumed}"
        lines.append(f"money       ${_span(cost['dollars'], '{:,.4g}')} at {price}")
    if basis["calibrate"]:
        lines.append("            `deepen doctor --calibrate` measures this machine in ten seconds")
    return [*lines, ""]


def _measured(found: Mapping[str, Any]) -> str:
    """Say of what a step is made."""
    kinds = "".join(
        f"{kind['blocks']} {_STATES[kind['state']]} × {kind['seconds'] * 1e3:.3g} ms + "
        for kind in found["blocks"]
    )
    step = {name: 1e3 * seconds for name, seconds in found["step"].items()}
    return f"a step: {_span(step, '{:,.4g}')} ms = {kinds}{found['rest'] * 1e3:.3g} ms for all else"


def _levers(levers: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Table:
    table = Table(
        "lever", "say", "memory", "", "time", "", title="what would change that", title_justify="left"
    )
    table.add_row("as it is", "", human_bytes(facts["memory_bytes"]["total"]), _FITS[facts["fits"]], "1.00 ×")
    for lever in levers:
        time = "" if lever["time"] is None else f"{lever['time']:.2f} ×"
        size = human_bytes(lever["memory_bytes"])
        table.add_row(lever["name"], lever["setting"], size, _FITS[lever["fits"]], time, lever["note"])
    return table


def _devices(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("device", "has", "", "time", "money", title="the same elsewhere", title_justify="left")
    for row in rows:
        time = _hours(row["seconds"]) if row["seconds"] and row["fits"] is not False else ""
        money = f"${_span(row['dollars'], '{:,.3g}')}" if row["dollars"] and time else ""
        table.add_row(row["key"], human_bytes(row["device_bytes"]), _FITS[row["fits"]], time, money)
    return table


def _paper(paper: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    dollars = f", ${_span(paper['dollars_here'], '{:,.0f}')}" if paper["dollars_here"] else ""
    return [
        "",
        f"LLaMA Pro's own run took {paper['gpu_hours']:,.0f} GPU hours on {paper['devices']} H800 for "
        f"{human_count(paper['tokens'])} tokens ({paper['flops_per_second'] / 1e12:.0f} TFLOP/s each).",
        f"On {facts['job']['device']}: {_span(paper['hours_here'], '{:,.0f}')} device hours{dollars}, "
        "by its data sheet.",
    ]


def _span(span: Mapping[str, float], form: str) -> str:
    """Return `expected (low to high)`."""
    low, expected, high = (form.format(span[name]) for name in ("low", "expected", "high"))
    return f"{expected} ({low} to {high})"


def _hours(span: Mapping[str, float]) -> str:
    unit, seconds = next(
        (
            (name, size)
            for name, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0))
            if span["low"] >= size
        ),
        ("s", 1.0),
    )
    return f"{_span({name: value / seconds for name, value in span.items()}, '{:,.3g}')} {unit}"
