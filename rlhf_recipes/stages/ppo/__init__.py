"""PPO: the stage, its trainer, losses and guards."""
