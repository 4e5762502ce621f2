"""One HTML file about one or several runs: settings, health, and what they learnt."""
