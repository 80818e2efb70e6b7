from session.conftest import make_world as make_world
