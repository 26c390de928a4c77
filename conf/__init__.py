"""Configuration groups, shipped as package data (`orchestrator.conf`)."""
