"""Runs stages on other hosts, by Prefect's pool `hosts` or a cluster.

Processes of this host stand in flows.processes.
"""
