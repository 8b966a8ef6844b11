"""What every kernel is written with: lanes, shared memory, launches, schedules, tuned configurations."""
