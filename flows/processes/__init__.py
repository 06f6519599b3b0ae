"""Starts, forks, supervises and ends child processes, and closes the runs of killed ones.

Servers stand in flows.servers.
"""
