"""Scores of a model: loss on text, multiple choice by loss, programs that pass their tests, the ship checklist."""
