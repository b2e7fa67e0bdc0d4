"""The 92 first and 190 last names of ParallelBench's waiting-line tasks: facts, so that its items can be fed in."""

from __future__ import annotations

FIRST = """
    Aaron Adam Alan Albert Alexander Alice Amy Andrew Ann Anna Anthony Arthur Austin Billy Brandon Brian Bruce
    Carl Carol Charles Charlotte Christian Christopher Daniel David Donald Edward Elizabeth Emily Emma Eric
    Frank Gary George Grace Henry Jack Jacob James Jason Jean Jennifer Jeremy Jerry Jessica Joe John Johnny
    Jonathan Jordan Jose Joseph Juan Justin Karen Keith Kelly Kevin Kyle Larry Laura Lisa Louis Maria Mark
    Martin Mary Matthew Michael Michelle Patrick Paul Peter Philip Rachel Richard Robert Roger Rose Roy Ryan
    Sarah Scott Sean Stephen Steven Susan Thomas Tyler Victoria Virginia William
""".split()

LAST = """
    Adams Alexander Allen Alvarez Anderson Armstrong Bailey Baker Barnes Bell Bennett Black Boyd Brooks Brown
    Bryant Burke Burns Butler Campbell Carr Carson Carter Castillo Castro Chavez Chen Clark Cole Coleman Collins
    Cook Cooper Cox Crawford Cruz Daniels Davis Diaz Dunn Edwards Ellis Evans Fernandez Fisher Flores Ford
    Foster Fox Franklin Freeman Garcia Gardner Gibson Gomez Gonzalez Gordon Graham Gray Green Griffin Hall
    Hamilton Harris Harrison Harvey Hayes Henderson Henry Hernandez Hicks Hill Holmes Howard Hughes Hunt Hunter
    Jackson James Jenkins Johnson Johnston Jones Jordan Kelly Kennedy Kim King Lane Lawrence Lee Lewis Long
    Lopez Lynch Marshall Martin Martinez McDonald Medina Meyer Miller Mills Mitchell Moore Morales Morgan Morris
    Murphy Murray Myers Nelson Nguyen Olson Ortiz Owens Palmer Parker Patel Patterson Payne Perez Perkins Perry
    Peterson Phillips Pierce Porter Powell Price Ramirez Ramos Reed Reid Reyes Reynolds Richardson Riley Rivera
    Roberts Robertson Robinson Rodriguez Rogers Romero Rose Ross Ruiz Russell Ryan Sanchez Sanders Schmidt Scott
    Shaw Simmons Simpson Smith Snyder Stephens Stevens Stewart Stone Sullivan Taylor Thomas Thompson Torres Tran
    Tucker Turner Wagner Walker Wallace Walsh Ward Warren Washington Watson Webb Wells West Wheeler White
    Williams Wilson Wood Woods Wright Young
""".split()
