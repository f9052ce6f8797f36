"""Metrics and statistics that several papers share; none of it needs an engine."""
