"""MT-Bench: answers to two-turn questions, graded from 1 to 10 by a judge model.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685:
single-answer grading. Order: `questions` reads a question, a model answers both turns (elsewhere:
this package loads no model), `prompts` builds the judge's messages, `endpoint` sends them, and
`judging` stores the replies and computes the means.
"""
