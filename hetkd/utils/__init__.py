"""Checks, files, processes, compilation: nothing here knows of distillation."""
