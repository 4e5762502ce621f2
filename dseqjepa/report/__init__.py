"""One HTML file that shows what runs were, whether they are healthy, and what they learnt."""
