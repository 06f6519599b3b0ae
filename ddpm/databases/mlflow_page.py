"""Gives the address of MLflow's chart of scores against steps."""

from __future__ import annotations


def chart(experiment: str) -> str:
    """Returns the end of the address of the chart of all points, from `#` on.

    The address selects MLflow's pages for models (workflowType), since MLflow 3.17 has no experiment tag for that.
    """
    return (
        f"#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART"
        "&searchFilter=tags.%60ddpm.stage%60%20%3D%20'sample'&orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"
    )
