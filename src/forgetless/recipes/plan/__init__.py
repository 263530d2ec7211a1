"""`plan`: what to train, how, why, and what it will cost, before any weight is loaded."""

from forgetless.planning.advice import Wishes
from forgetless.planning.plan import Plan, plan
from forgetless.planning.showing import render
from forgetless.planning.written import recipe_text

__all__ = ["Plan", "Wishes", "plan", "recipe_text", "render"]
