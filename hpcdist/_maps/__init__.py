"""Pools of workers, and maps over items."""
