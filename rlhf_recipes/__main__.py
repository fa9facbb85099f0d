from rlhf_recipes.cli import main

main()
