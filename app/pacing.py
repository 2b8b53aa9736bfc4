"""How often pages look at what goes on elsewhere."""

LOOK_SECONDS = 2.0
"""Between two looks at a training; a job's own progress is looked at every second."""
