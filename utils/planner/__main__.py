"""python -m utils.planner --step ppo --config FILE: does the run fit, and what would mend it?"""

from utils.planner import plan

plan.main()
