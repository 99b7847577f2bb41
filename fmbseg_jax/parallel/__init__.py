"""Devices and hosts: mesh, agreement of processes, ring, being told to stop."""
