raise SystemExit("python -m utils.planner is now python -m evaluation.plan, with the same flags")
