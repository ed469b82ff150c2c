"""MT-Bench: answers to two-turn questions, graded from 1 to 10 by a judge model.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685:
single-answer grading. A question's walk: `questions` reads it, a model answers both turns (outside
of here: this package loads no model), `prompts` makes the judge's messages, `endpoint` sends them,
and `judging` keeps the replies and takes the means.
"""
