from vlscale.cli import main

main()
