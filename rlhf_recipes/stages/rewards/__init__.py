"""Rewards beside a reward model: written rules, and their sum with a model's score."""
