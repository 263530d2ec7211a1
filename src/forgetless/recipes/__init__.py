"""What a run, a study and a plan are made of: parse, check, identify. No training is done here."""
