"""How good a model is: loss on text, multiple choice by loss, programs that pass their tests."""
