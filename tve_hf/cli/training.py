"""tve-hf pretrain and evaluate."""

from .parser import dataclass_of


def pretrain(arguments: list[str]) -> int:
    """Pre-train an explainer for a classifier's backbone on unlabelled images."""
    from ..pretrain import PretrainArguments
    from ..pretrain import pretrain as run

    run(dataclass_of(pretrain, PretrainArguments, arguments))
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure an explainer on held-out images: agreement with exact, and fidelity beside other methods."""
    from ..benchmark.run import EvaluateArguments
    from ..benchmark.run import evaluate as run
    from ..evaluation.report import table_of

    print(table_of(run(dataclass_of(evaluate, EvaluateArguments, arguments))))
    return 0
