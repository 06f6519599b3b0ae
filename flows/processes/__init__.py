"""Starts, forks, supervises and ends child processes, and closes the flow runs of killed processes.

Servers are in flows.servers.
"""
