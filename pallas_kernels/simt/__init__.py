"""What every kernel is written with: facts of chip and formats, lanes, launches, schedules, tuned configurations."""
