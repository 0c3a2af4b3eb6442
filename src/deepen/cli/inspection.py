"""What `deepen blocks inspect` prints."""

from math import isfinite

from rich import box
from rich.table import Table

from deepen.blocks import BlockNorms, BlocksSummary, Norm
from deepen.cli.blocks import count_blocks
from deepen.cli.output import human_bytes, human_count, table_console


def show(path: str, facts: BlocksSummary) -> None:
    """Print a summary: the layout, its history, and a table of norms."""
    expansion = facts.expansion
    print(f"{path}: {facts.kind} of {expansion.base} ({expansion.family}, {expansion.base_blocks} blocks)")
    print(facts.layout)
    count = len(expansion.latest_blocks)
    print(
        f"{count_blocks(count)}: {human_count(facts.parameters)} parameters, {facts.dtypes}, "
        f"{human_bytes(facts.bytes)}"
    )
    if len(facts.lineage) > 1:
        for stage in facts.lineage:
            print(f"stage {stage.stage}: {stage.layout.draw()}  on {stage.base}")
    if facts.packs:
        print(f"packs, bottom to top: {', '.join(facts.packs)}")
    if expansion.averaged:
        shares = (f"{each.share:.3g} × {name}" for name, each in expansion.averaged.items())
        print(f"average: {' + '.join(shares)}")
    print(f"base fingerprint (fast): {expansion.base_fingerprint.fast}")
    if rows := expansion.new_rows:
        print(f"with them the last {rows.count:,} rows of {', '.join(rows.tables)}, for new tokens")
    if facts.base_unchanged is False:
        print("its base blocks are not the base's any more: they were trained too")
    table_console(highlight=False, markup=False).print(_table(facts))
    print(_explain(facts))


def _table(facts: BlocksSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = list(dict.fromkeys(norm.name for block in facts.blocks for norm in block.writes))
    for title in ("block", "after", "copy of"):
        table.add_column(title, justify="right")
    if facts.packs:
        table.add_column("pack")
    if _damped(facts):
        table.add_column("α", justify="right")
    for title in [name.removesuffix(".weight") for name in names]:
        table.add_column(title, justify="right", no_wrap=True)
    if facts.reference:
        table.add_column("the rest moved", justify="right")
    for block in facts.blocks:
        table.add_row(*_row(block, names, facts))
    return table


def _row(block: BlockNorms, names: list[str], facts: BlocksSummary) -> list[str]:
    record, writes = block.block, {norm.name: norm for norm in block.writes}
    after = str(record.after) if record.after >= 0 else "bottom"
    cells = [str(record.index), after, str(record.copy_of)]
    if facts.packs:
        cells.append(record.pack or "")
    if _damped(facts):
        cells.append("1" if record.damped is None else f"{record.damped:g}")
    cells += [_cell(writes.get(name), bool(facts.reference)) for name in names]
    if facts.reference:
        cells.append(_cell(block.changed, True))
    return cells


def _damped(facts: BlocksSummary) -> bool:
    return any(block.block.damped is not None for block in facts.blocks)


def _cell(norm: Norm | None, compared: bool) -> str:
    if norm is None:
        return "–"
    if not compared or norm.relative is None:
        return f"{norm.rms:.3g}"
    return f"{100 * norm.relative:.3g} %" if isfinite(norm.relative) else f"{norm.rms:.3g} rms"


def _explain(facts: BlocksSummary) -> str:
    if not facts.reference:
        return "what was filled: root mean square of what it holds beyond its fill (give --base to compare)"
    return (
        f"norms relative to the copied block's own in {facts.reference}: of what was filled beyond its "
        "fill, of the rest its distance from the copy"
    )
