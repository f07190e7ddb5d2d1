"""What all recipes share: training and its report, icons and pages made of them, noise, a language model that names."""
