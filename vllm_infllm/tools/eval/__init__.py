"""Evaluation of long contexts: tasks, engines that answer them, results, table and pictures."""
