"""Measures of rankings, and what is written about them: runs, figures, tables and plots."""

from __future__ import annotations

from ..lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "evaluate": ["evaluate_system", "run_file"],
        "in_loop": ["RetrievalEvaluation"],
        "measures": ["DEFAULT_MEASURES", "Result", "evaluate_run", "metric_folder", "parse_measure"],
        "plots": ["plot_report", "plot_tradeoff", "plot_training"],
        "report": [
            "load_metrics",
            "markdown_table",
            "print_summary",
            "read_per_query",
            "summary_table",
            "update_metrics",
            "write_per_query",
        ],
        "significance": [
            "Comparison",
            "adjust_p_values",
            "average_seeds",
            "compare_systems",
            "paired_randomization_test",
            "paired_t_test",
        ],
    },
)
