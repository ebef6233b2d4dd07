"""`objectcompose evaluate METRIC`: a registry of metrics, each a command of its own.

A metric is a module with `HELP`, `add_arguments(parser)` and `main(args)`, as the commands of
`objectcompose.__main__` are; all write `<out>/report.json`. Several processes share the work under
`accelerate launch -m objectcompose evaluate ...` (on CPUs: `torchrun -m ...`); a killed run goes on when it is
started again.
"""

from __future__ import annotations


HELP = "Measure a model: objects found, layouts, distances, attention maps."
COMMANDS: dict[str, str] = {
    "compbench": "objectcompose.evaluation.compbench",
    "composition": "objectcompose.evaluation.composition",
    "disentangle": "objectcompose.evaluation.disentangle",
    "fd": "objectcompose.evaluation.frechet",
    "layout": "objectcompose.evaluation.layout",
    "map-iou": "objectcompose.evaluation.map_iou",
    "multigen": "objectcompose.evaluation.multigen",
    "pairs": "objectcompose.evaluation.pairs",
    "visor": "objectcompose.evaluation.visor",
}
