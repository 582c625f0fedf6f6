"""The fault campaign: real processes, real faults, and what clients and log say afterwards."""
