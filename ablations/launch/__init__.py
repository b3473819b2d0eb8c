"""Where jobs run: this process, local workers or Slurm, all through submitit."""
