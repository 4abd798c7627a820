"""What a model costs, where a step's time goes, pictures of runs, and what a terminal can show."""
