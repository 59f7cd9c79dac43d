"""`python -m rmsnorm_deploy` runs the command `rmsnorm`."""

from rmsnorm_deploy.cli import main

if __name__ == "__main__":
    main()
