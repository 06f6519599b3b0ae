"""Runs stages on other hosts, through Prefect's pool `hosts` or a Dask cluster.

Processes of this host are in flows.processes.
"""
