"""Measure what a method costs compared with the frozen base."""
