"""Pages for people, made from the records of a run and nothing else."""

from deepen.report.card import write_card
from deepen.report.comparison import describe_differences, print_table, render_table, write_comparison_page
from deepen.report.complete import complete_pages
from deepen.report.continual import print_continual, write_continual_report
from deepen.report.effects import print_effects, render_effects, write_effects_page
from deepen.report.page import write_report
from deepen.report.preview import PreviewPiece, PreviewWindow, write_preview_page
from deepen.report.read import RunReport, read_run
from deepen.report.retention import finding, p_value
from deepen.report.study import print_study, read_study, render_study, write_study_report
from deepen.report.watch import WatchServer
from deepen.report.worth import print_worth, render_worth, write_worth_page

__all__ = [
    "PreviewPiece",
    "PreviewWindow",
    "RunReport",
    "WatchServer",
    "complete_pages",
    "describe_differences",
    "finding",
    "p_value",
    "print_continual",
    "print_effects",
    "print_study",
    "print_table",
    "print_worth",
    "read_run",
    "read_study",
    "render_effects",
    "render_study",
    "render_table",
    "render_worth",
    "write_card",
    "write_comparison_page",
    "write_continual_report",
    "write_effects_page",
    "write_preview_page",
    "write_report",
    "write_study_report",
    "write_worth_page",
]
