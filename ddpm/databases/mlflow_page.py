"""Gives the address of MLflow's chart of scores against steps."""

from __future__ import annotations


def chart(experiment: str) -> str:
    """Returns the address of MLflow's chart of all points of an experiment, from `#` on.

    The parameter `workflowType` selects MLflow's pages for model training. MLflow 3.17 has no experiment tag that does this.

    Args:
        experiment: the id of the experiment.
    """
    return (
        f"#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART"
        "&searchFilter=tags.%60ddpm.stage%60%20%3D%20'sample'&orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"
    )
