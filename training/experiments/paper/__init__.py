"""The tables and figures of Kim et al. 2026 (arXiv:2602.22988), run again at the scale of two processor cores.

One module a table or figure, ``table_01`` to ``table_18`` and ``figure_1`` to ``figure_7``. Each has

    TITLE      what the table or figure is about
    CHEAP      whether `section` takes less than about a minute, once its runs are made
    SPECS      the sweeps whose records it reads, names of files in ``training/experiments/specs/paper``
    section()  -> `Section`: the paper's figures beside ours

`python -m training.experiments.paper` computes them; docs/paper.md is rendered from the results that are kept.
"""
