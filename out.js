
"use strict";
// All that is shown is a function of what is known. Handlers change `state` and call render(), and
// draw() alone touches the page. The server is asked for nothing that an event has told.
const state = {
  login: null,                      // {token, stay, renewAt}: whether it is kept, and a time in ms
  me: "", epoch: null,              // as the welcome said: who this is, and which database
  connection: "",                   // "connecting", "connected", "reconnecting", "logged out"
  retryAt: Infinity, why: "", problem: "", // in ms; what is wrong; what the log-in page tells
  rooms: new Map(), current: null,  // key -> room; the one that is shown
  roles: new Map(),                 // name -> role, of all that events have named
  outbox: new Map(),                // mid -> message that the server has not acknowledged
  search: null,                     // {kind, q, found, more}; what is found stands for the room
  entries: [], pausedAt: null,      // of the wire, oldest first
  operations: [], tried: null,      // of /openapi.json; the socket that the wire's form opened
};

// -- Elements: text goes in as text nodes, never as HTML, so whatever others write stays text ----
const $ = (id) => document.getElementById(id);
const on = (id, type, action) => $(id).addEventListener(type, action);
const put = (id, properties) => {  // only what differs: else it would be read aloud again
  for (const [name, value] of Object.entries(properties)) {
    if ($(id)[name] !== value) $(id)[name] = value;
  }
};
const say = (id, textContent) => put(id, {textContent});
// make("p.small", {title: "..."}, "text", child): properties may be left out, and so are children
// that are false, null or "".
const make = (kind, ...children) => {
  const [tag, ...names] = kind.split("."), element = document.createElement(tag);
  const properties = children[0]?.constructor === Object ? children.shift() : {};
  element.append(...children.flat().filter((child) => child || child === 0));
  return Object.assign(element, {className: names.filter(Boolean).join(" ")}, properties);
};
const button = (text, onclick, kind = "") => make(`button${kind}`, {type: "button", onclick}, text);
const icon = (name) => $("icons").content.querySelector(`.i-${name}`).cloneNode(true);
for (const one of document.querySelectorAll("[data-icon]")) one.prepend(icon(one.dataset.icon));
// Makes a function from things to their elements. One is built anew only if what is `shown` of the
// thing differs, so that selections and what is unfolded stay.
const cached = (build, elements = new WeakMap()) => (thing, ...shown) => {
  const before = elements.get(thing), version = JSON.stringify(shown);
  if (before?.version === version) return before;
  const element = Object.assign(build(thing, ...shown), {version});
  const hadFocus = before?.contains(document.activeElement);
  elements.set(thing, element); before?.replaceWith(element);
  if (hadFocus) (element.querySelector("summary, li > button") ?? element).focus();
  return element;
};
// Makes these elements the children of a parent; what is in its place already is not touched.
const arrange = (parent, wanted) => {
  const keep = new Set(wanted);
  for (const child of [...parent.children]) if (!keep.has(child)) child.remove();
  let next = parent.firstElementChild;
  for (const element of wanted) {
    if (element === next) next = next.nextElementSibling; else parent.insertBefore(element, next);
  }
};
let drawTimer = 0;  // however much has changed, the page is drawn once for it
const render = () => { drawTimer ||= setTimeout(draw, 16); };

// -- What is kept in the browser ---------------------------------------------------------------
const parsed = (text) => { try { return JSON.parse(text); } catch { return undefined; } };
const storageOf = (name) => {  // a browser may keep nothing for a page
  try { return window[name]; } catch { return {getItem: () => null, removeItem() {}}; }
};
const local = storageOf("localStorage"), session = storageOf("sessionStorage");
const kept = (name, fallback = null, storage = local) =>
  parsed(storage.getItem(`lobby.${name}`)) ?? fallback;
const keep = (name, value, storage = local) => {
  try {
    if (value === null) storage.removeItem(`lobby.${name}`);
    else storage.setItem(`lobby.${name}`, JSON.stringify(value));
  } catch { state.why = "this browser keeps nothing, so what is not sent goes with the tab"; }
};
// What another tab of this browser has sent, read, or learnt about the log-in.
addEventListener("storage", ({key, newValue}) => {
  const [, kind, user, ...rest] = key?.split(".") ?? [], value = parsed(newValue);
  if (kind === "login" && value && state.login?.stay
    && claimsOf(value).sub !== claimsOf(state.login).sub) takeLogIn(state.login.token, false);
  if (user !== state.me) return;
  if (kind === "news" && value) { takeLogIn(value, state.login.stay); connect(); }
  const room = kind === "read" && state.rooms.get(rest.slice(1).join("."));
  if (room) markRead(room, value);
  if (kind === "outbox" && !value) settle(rest[0]);
  render();
});

// -- Requests and sockets, as the wire records them --------------------------------------------
const lanes = [null, null];  // the sockets that are open, by their lane of the thread
const bytesOf = (text) => new TextEncoder().encode(text).length;
const hideSecrets = (text) => text
  .replace(/eyJ[\w-]{7}[\w-]*\.[\w-]+\.[\w-]+/g, (token) => `${token.slice(0, 10)}…`)
  .replace(/("(?:old|new)":|\\?"password\\?"\s*:\s*)\\?"(?:[^"\\]|\\.)*?\\?"|(password=)[^&\s"]+/g,
    '$1$2"…"');
const record = (entry) => {
  const last = state.entries.at(-1), {socket, title, way, texts} = entry;
  render();
  if (entry.fades && last?.title === title && last.socket === socket && last.way === way) {
    last.count = last.texts.push(...texts); return last;
  }
  const through = [0, 1].filter((lane) => lanes[lane] && lane !== entry.lane);
  state.entries.push(Object.assign(entry, {at: new Date(), through, count: 1}));
  state.entries.splice(0, state.entries.length - 300); return entry;
};
// Sends a request; it and its answer are one entry.
const request = async (method, path, headers = [], body = undefined) => {
  const asked = new Request(path, {method, headers, body}), start = performance.now();
  const line = hideSecrets(asked.url.slice(location.origin.length));
  const entry = record({kind: "http", method, path: line, title: `${method} ${line}`, status: 0,
    headers: [...asked.headers].map(([name, value]) => [name, hideSecrets(value)]),
    body: body instanceof FormData ? "(a form with a file)" : hideSecrets(body ?? ""),
    again: () => request(method, path, headers, body)});
  try {
    const response = await fetch(asked), answer = await response.text();
    Object.assign(entry, {status: response.status, reason: response.statusText,
      text: hideSecrets(answer), bytes: bytesOf(answer), answered: [...response.headers]});
    return {response, answer, entry};
  } catch {
    entry.status = -1;
    throw new Error("No answer. Is the server running, and is there a network?");
  } finally { entry.ms = performance.now() - start; render(); }
};
// A request of the page's own: JSON in and out. Throws an Error with the server's words.
const api = async (method, path, json = undefined) => {
  const headers = state.login ? [["Authorization", `Bearer ${state.login.token}`]] : [];
  if (json) headers.push(["Content-Type", "application/json"]);
  const {response: {ok, status}, answer} = await request(method, path, headers,
    json && JSON.stringify(json));
  const value = parsed(answer);  // a proxy may answer no JSON
  if (ok) return value ?? null;
  const detail = value?.detail ?? `The server answered ${status}. Try again later.`;
  const {msg, loc} = Array.isArray(detail) ? detail[0] : {msg: detail, loc: []};
  throw Object.assign(new Error(msg.replace(/^String/, "It")), {field: loc.at(-1), status});
};
const complain = ({message}) => note(`Error: ${message}`, true);  // in the room
const attempt = (...request) => api(...request).catch(complain);
// A WebSocket whose handshake, frames and end are entries on its lane of the thread.
const openSocket = (url, protocols = []) => {
  const socket = new WebSocket(url, protocols), lane = lanes[0] ? 1 : 0, start = performance.now();
  const path = hideSecrets(url.pathname + url.search), list = hideSecrets(protocols.join(", "));
  const entry = record({kind: "open", method: "GET", path, title: `GET ${path}`, socket, lane,
    status: 0, headers: list ? [["sec-websocket-protocol", list]] : []});
  lanes[lane] = Object.assign(socket, {binaryType: "arraybuffer", lane, entry, asked: new Map()});
  socket.addEventListener("open", () => {
    Object.assign(entry, {status: 101, reason: "Switching Protocols", picked: socket.protocol,
      ms: performance.now() - start, answered: [["sec-websocket-accept", "hidden from scripts"],
        ["sec-websocket-protocol", socket.protocol || "none"],
        ["ping, pong", "a browser answers them itself, and tells no page"]]});
    socket.asked.set("", performance.now()); render();
  });
  socket.addEventListener("message", ({data}) => recordFrame(socket, "in", data));
  socket.addEventListener("close", ({code, reason}) => {
    if (lanes[lane] === socket) lanes[lane] = null;
    record({kind: "close", way: "in", title: "close", socket, lane, code, reason,
      texts: [`${code} ${reason}`], bytes: [1005, 1006].includes(code) ? 0 : 2 + bytesOf(reason)});
  });
  return socket;
};
const frameOf = (way, data, ms = undefined) => {
  const isText = typeof data === "string", text = isText ? data : `(${data.byteLength} bytes)`;
  const types = [...text.matchAll(/^{"type":"(\w+)/gm)].map((found) => found[1]);
  return {kind: "frame", way, types, texts: [hideSecrets(text)], ms,
    event: parsed(text.split("\n", 1)[0]), bytes: data.byteLength ?? bytesOf(text),
    title: [...new Set(types)].join(", ") || (isText ? "text" : "bytes"),
    fades: types.length === 1 && /typing|joined|left/.test(types[0])};
};
const recordFrame = (socket, way, data) => {
  const frame = frameOf(way, data), {event, types} = frame, now = performance.now();
  if (event?.http_version) socket.entry.seen = event;  // it echoes the handshake
  const about = event?.mid ?? (/join|history/.test(types[0]) ? "history" : "");  // what it answers
  if (way === "in") frame.ms = now - socket.asked.get(about) || undefined;
  if (way === "out") socket.asked.set(about, now); else socket.asked.delete(about);
  record(Object.assign(frame, {socket, lane: socket.lane}));
};
const sendFrame = (socket, text) => { recordFrame(socket, "out", text); socket.send(text); };
const socketUrl = (path) => new URL(path, location.href.replace(/^http/, "ws").replace(/#.*/, ""));

// -- The log-in: kept, renewed before its end, asked for again where it ends all the same --------
const claimsOf = ({token}) => {  // what a token says of itself; only the server knows if it is true
  try { return parsed(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"))) ?? {}; }
  catch { return {}; }
};
const lifeOf = (login) => (claimsOf(login).exp - claimsOf(login).iat) * 1_000 || 3_600_000;
const keepLogIn = (value) => keep("login", value, state.login.stay ? local : session);
const takeLogIn = (token, stay) => {
  if (stay) keep("login", null, session);
  state.login = {token, stay, renewAt: Date.now() + 0.8 * lifeOf({token})};
  keepLogIn(state.login);
};
// The clock is looked at, since a timer would stop while the computer sleeps.
setInterval(() => {
  if (Date.now() > state.login?.renewAt) renew();
  if (Date.now() > state.retryAt) connect();
  if (Date.now() > sending?.until) disconnected("no answer came");
  if (state.connection === "reconnecting") render();  // it shows the seconds
}, 500);
// A new token for the same log-in. True: it came; false: it will not; null: nobody can tell yet.
const renew = async () => {
  const {login} = state;
  login.renewAt = Date.now() + Math.min(30_000, lifeOf(login) / 20);  // should this one fail
  try {
    const {access_token: token} = await api("POST", "renew");
    if (login === state.login) takeLogIn(token, login.stay);
  } catch ({status}) {
    if (login === state.login && status !== 401) return null;
    login.renewAt = Infinity; return login !== state.login;
  }
  return true;
};
const enter = (token, stay) => {
  takeLogIn(token, stay); state.problem = $("password").value = "";
  if (state.me) for (const news of [token, null]) keep(`news.${state.me}`, news);  // to other tabs
  connect();
};
const logIn = async (username, password, stay) =>
  enter((await api("POST", "login", {username, password, stay})).access_token, stay);
// The log-in has ended: renew it if it stays, else ask for the password over the page as it is.
const logInEnded = async (reason) => {
  const {login} = state, isOld = /expired/.test(reason);
  hangUp();
  const renewed = isOld && login.stay && await renew();
  if (renewed) return state.login && connect();
  if (renewed === null) return disconnected("");
  if (!state.me) return refuse("Your log-in has ended.");
  state.connection = "logged out";
  state.why = isOld ? `After ${Math.round(lifeOf(login) / 60_000)} minutes`
    : reason.replace("Unauthorized: ", "");
  askAgain(); render();
};

// -- Rooms -------------------------------------------------------------------------------------
const FOLLOWED = 48;  // rooms of last time, and private ones; one socket may follow 100
const MOST = 1_000;   // messages of a room that are kept here; older ones come back on scrolling up
// A room's name in any spelling is one key, and so are the two names of a private conversation.
const keyOf = (name) => {
  const folded = name.normalize("NFKC").toUpperCase().toLowerCase();
  return folded.startsWith("@") ? `@${folded.slice(1).split("+").sort().join("+")}` : folded;
};
const roomOf = (name) => {
  const key = keyOf(name), {rooms, me, epoch} = state;
  if (!rooms.has(key)) rooms.set(key, {key, name, items: new Map(), last: null, more: false,
    joined: "no",  // then "asked", then "yes": only when its history is here, all else of it counts
    read: kept(`read.${me}.${epoch}.${key}`), unread: new Set(), newAfter: null,
    here: new Set(), typing: new Map(), loading: false, refused: "", place: 0,
    left: kept(`left.${me}.${key}`, -1)});  // the last id when it was closed
  return rooms.get(key);
};
const isPrivate = (room) => room.key.startsWith("@");
const privateWith = (user) => `@${[state.me, user].sort().join("+")}`;
const titleOf = ({name}) => !name.startsWith("@") ? name
  : name.slice(1).split("+").find((one) => keyOf(one) !== keyOf(state.me)) ?? state.me;
const pathOf = (name) => `rooms/${encodeURIComponent(name)}/messages`;
const pendingIn = ({key}) => [...state.outbox.values()].filter(({room}) => keyOf(room) === key);
const isListed = (room) => room === state.current || pendingIn(room).length
  || (!room.refused && (room.last ?? 0) > room.left);
const oldestOf = (room) => [...room.items.values()].find(({id}) => id)?.id;
const roleOf = (user) => state.roles.get(user) ?? "member";
const may = (...roles) => roles.includes(roleOf(state.me));
const readTo = (room, id) => keep(`read.${state.me}.${state.epoch}.${room.key}`, room.read = id);
const markRead = (room, id = room.last) => {
  if (id > room.read) readTo(room, id);
  for (const one of room.unread) if (one <= room.read) room.unread.delete(one);
};
const atNewest = () => $("chatLog").scrollTop > -40;  // it counts down from 0, the newest
const isLooking = (room) =>
  room === state.current && !document.hidden && atNewest() && !state.search?.found;
const draftOf = (room) => `draft.${state.me}.${room.key}`;
const keepRooms = () => keep(`rooms.${state.me}`, [...state.rooms.values()]
  .filter((room) => !isPrivate(room) && room.joined !== "no")
  .map(({name}) => name).slice(-FOLLOWED));
const openRoom = (name) => {
  const old = state.current, room = roomOf(name);
  if (old && old !== room) {
    if (!state.search?.found) old.place = $("chatLog").scrollTop;
    if (!old.unread.size) old.newAfter = null;
  }
  if (old !== room) $("messageText").value = kept(draftOf(room), "");
  Object.assign(room, {left: -1, refused: ""});
  Object.assign(state, {current: room, search: null, arriving: true}); join(room);
  if (addressed() !== room.name) location.hash = room.name;
  $("side").hidePopover();
  if (!matchMedia("(pointer: coarse)").matches) $("messageText").focus();
  render(); return room;
};
const leaveRoom = (room) => {  // a private one is followed on, and comes back with a new message
  if (isPrivate(room)) keep(`left.${state.me}.${room.key}`, room.left = room.last ?? 0);
  else { transmit({type: "leave", room: room.name}); state.rooms.delete(room.key); keepRooms(); }
  openRoom("lobby");
};
const addressed = () => decodeURIComponent(location.hash.slice(1)) || "lobby";
addEventListener("hashchange", () => {
  if (state.me && keyOf(addressed()) !== state.current.key) openRoom(addressed());
});

// -- The outbox: what is typed is kept until the server has it ---------------------------------
let sending = null;  // {mid, until}: what waits for its receipt; one by one keeps their order
const keepItem = (item, value = item) => keep(`outbox.${state.me}.${item.mid}`, value);
const loadOutbox = () => {
  const mine = Object.keys(local).filter((name) => name.startsWith(`lobby.outbox.${state.me}.`));
  const items = mine.map((name) => parsed(local.getItem(name))).filter(Boolean);
  for (const item of items.sort((one, other) => one.at - other.at)) {
    if (!state.outbox.has(item.mid)) state.outbox.set(item.mid, item);
    roomOf(item.room);  // to be seen somewhere
  }
};
const post = (room, text) => {
  const mid = crypto.getRandomValues(new Uint32Array(4)).join("-");
  const item = {mid, room: room.name, user: state.me, text, at: Date.now() / 1_000};
  state.outbox.set(mid, item); keepItem(item); room.newAfter = null;
  $("chatLog").scrollTop = 0; sendNext();
};
const sendNext = () => {
  const next = [...state.outbox.values()].find((item) => !item.problem);
  render();
  if (sending || !next || state.connection !== "connected") return;
  sending = {mid: next.mid, until: Date.now() + 20_000};
  transmit({type: "message", room: next.room, text: next.text, mid: next.mid});
};
// The server has it, or has refused it. Returns the message, whose element is used on.
const settle = (mid, problem = null) => {
  const item = state.outbox.get(mid);
  if (!item) return null;
  if (problem) item.problem = problem; else state.outbox.delete(mid);
  keepItem(item, problem && item);
  if (sending?.mid === mid) sending = null;
  sendNext(); return item;
};
const tryAgain = (item) => { delete item.problem; keepItem(item); sendNext(); };

// -- Events ------------------------------------------------------------------------------------
const hear = (event) => {
  const {type, user, id} = event;
  render();
  if (type === "welcome") return welcome(event);
  if (type === "error") return hearError(event);
  if (type === "role") return state.roles.set(user, event.role);
  const isKnown = state.rooms.has(keyOf(event.room));
  if (!isKnown && !event.room.startsWith("@")) return settle(event.mid);  // it was left meanwhile
  const room = roomOf(event.room);
  if (type === "history") return hearHistory(room, event);
  if (room.joined !== "yes") {  // its history will have it
    if (type !== "message" || room.joined === "asked") return;
    if (room.read === null) readTo(room, id - 1);
    return join(room);
  }
  switch (type) {
    case "presence": room.here = new Set(Object.keys(event.users));
      for (const one of room.here) state.roles.set(one, event.users[one]);
      break;
    case "joined": state.roles.set(user, event.role);  // and then as for "left"
    case "left": hearPerson(room, event); break;
    case "message": addMessage(room, event, isLooking(room)); break;
    case "deleted": room.unread.delete(id);
      Object.assign(room.items.get(id) ?? {}, {gone: true, text: ""}); break;
    case "typing": if (user !== state.me) room.typing.set(user, Date.now() + 5_000);
      setTimeout(render, 5_000);
  }
};
const hearHistory = (room, {room: name, messages, more, complete}) => {
  if (room.joined === "yes" && room.loading) {  // an older page
    const oldest = oldestOf(room), older = messages.filter(({id}) => id < oldest);
    const items = new Map([...older.map((one) => [one.id, one]), ...room.items]);
    quietly(); return Object.assign(room, {loading: false, more, items});
  }
  Object.assign(room, {name, joined: "yes", refused: ""});  // named as the server spells it
  if (!room.last || !complete) {
    Object.assign(room, {items: complete ? room.items : new Map(), more, last: 0});
    if (room.read === null) readTo(room, messages.at(-1)?.id ?? 0);
  }
  for (const message of messages) addMessage(room, message, false);
  keepRooms();
};
const addMessage = (room, event, isSeen) => {
  const message = Object.assign(settle(event.mid) ?? {}, event);
  if (message.id <= room.last) return;
  room.last = message.id; room.typing.delete(message.user);
  if (isSeen) markRead(room);
  else if (message.user !== state.me && message.id > room.read) {
    if (!room.unread.size) room.newAfter = room.read;
    room.newCount = room.unread.add(message.id).size;
    if (document.hidden) announce(room, message);
  }
  room.items.set(message.id, message);
  if (room.items.size <= MOST || (room === state.current && !atNewest())) return;
  for (const key of [...room.items.keys()].slice(0, MOST / 5)) room.items.delete(key);
  room.more = true;
};
// Comings and goings are one line as long as nothing else is said; who leaves and comes back at
// once has done neither. In a private conversation they are no news: the list shows them.
const hearPerson = (room, {type, user}) => {
  if (type === "joined") room.here.add(user); else room.here.delete(user);
  room.typing.delete(user);
  if (user === state.me || isPrivate(room)) return;
  let last = [...room.items.values()].at(-1);
  if (!last?.joined) room.items.set(last = {joined: new Set(), left: new Set()}, last);
  if (!last[type === "joined" ? "left" : "joined"].delete(user)) last[type].add(user);
};
const hearError = ({mid, message, room: name, retry_after: wait}) => {
  const room = name && state.rooms.get(keyOf(name));
  const later = (action) => setTimeout(action, wait * 1_000);
  if (state.outbox.has(mid)) {
    if (!wait) return settle(mid, message);
    later(() => { sending = null; sendNext(); });
  } else if (room?.joined === "asked") {
    room.joined = "no";
    if (wait) later(() => join(room)); else room.refused = message;
  } else complain({message});
};
// A line for the reader alone, in the room: what was found does not stay before it.
const note = (notice, isWrong = false) => {
  const item = {notice, isWrong};
  state.current?.items.set(item, item); render();
  if (state.search?.found) endSearch();
};
const welcome = ({user, role, epoch, rooms: talks}) => {
  if (state.epoch !== epoch) state.rooms.clear();  // another database
  const isFirst = !state.me, name = state.current?.name ?? addressed();
  Object.assign(state, {me: user, epoch, connection: "connected", why: ""});
  state.roles.set(user, role);
  for (const room of state.rooms.values()) Object.assign(room, {joined: "no", loading: false});
  loadOutbox(); roomOf(askedFor).joined = "asked";
  if (isFirst) openRoom(name); else state.current = roomOf(name);
  const known = kept(`rooms.${user}`, []), followed = talks.map(roomOf).slice(0, FOLLOWED);
  for (const one of ["lobby", name, ...known]) join(roomOf(one));
  followed.forEach(join); sendNext();
};

// -- Notifications: of private messages and mentions, for whoever has asked ---------------------
const whyNoNotices = () => !isSecureContext ? "Notifications: the browser wants https for them."
  : ["granted", "default"].includes(window.Notification?.permission) ? ""
    : "Notifications: this browser was told to allow none.";
const isNotified = () => !whyNoNotices() && Notification.permission === "granted"
  && kept(`notify.${state.me}`);
const isMention = (text) => {  // between Chinese words there is no space that could end a name
  const end = /\p{sc=Han}$/u.test(state.me) ? "" : "(?![\\p{L}\\p{M}\\p{N}_-])";
  return new RegExp(`(?<![\\p{L}\\p{N}])@${state.me}${end}`, "iu").test(text);
};
const announce = (room, {user, text, id}) => {
  if (!isNotified() || !(isPrivate(room) || isMention(text))) return;
  try {
    const shown = new Notification(user, {body: text.slice(0, 200), tag: `lobby ${id}`});
    shown.onclick = () => { window.focus(); openRoom(room.name); };
  } catch { /* some phones have them for service workers only */ }
};

// -- The connection ----------------------------------------------------------------------------
let socket = null;
let retries = 0;     // failed connections in a row
let askedFor = "";                // the room that the socket's URL names
const transmit = (...events) => {  // one frame, an event a line
  const lines = events.map((event) => JSON.stringify(event));
  if (socket?.readyState === WebSocket.OPEN) sendFrame(socket, lines.join("\n"));
};
const cursorOf = (room) =>  // after the last message that is here, or the newest page
  room?.last ? {after: room.last, epoch: state.epoch} : {};
const join = (room) => {
  if (room.joined !== "no" || state.connection !== "connected") return;
  room.joined = "asked"; transmit({type: "join", room: room.name, ...cursorOf(room)});
};
// Lets go of the socket: what it still says is not heard.
const hangUp = () => {
  if (socket) Object.assign(socket, {onmessage: null, onclose: null}).close();
  socket = sending = null; state.retryAt = Infinity;
};
const connect = () => {
  hangUp();
  if (state.connection === "logged out") $("dialog").close();
  const {login, current} = state, url = socketUrl("ws/chat");
  askedFor = current?.name ?? "lobby";
  url.search = new URLSearchParams({room: askedFor, ...cursorOf(current)});
  state.connection = "connecting"; render();
  try { socket = openSocket(url, ["lobby.v1", `bearer.${login.token}`]); }
  catch { return refuse("This is no token."); }
  socket.onmessage = ({data}) => {
    retries = 0;
    for (const line of data.split("\n")) hear(JSON.parse(line));
  };
  socket.onclose = ({code, reason}) => {
    if (code !== 1000 && code !== 1008) disconnected(reason);
    else if (/expired|Password|again/.test(reason)) logInEnded(reason);
    else refuse(reason.replace("Unauthorized: ", ""));
  };
};
const disconnected = (why) => {
  hangUp();
  const wait = Math.min(30_000, 1_000 * 2 ** retries++) * (0.5 + Math.random());
  Object.assign(state, {connection: "reconnecting", retryAt: Date.now() + wait, why}); render();
  if (retries === 4) api("GET", "healthz").then(() => {  // so HTTP gets through
    state.why = "the server opens no socket; does a proxy drop Upgrade or Host?";
  }, () => {});
};
// Back to the log-in page, loaded anew: nothing of this person stays for the next one to see.
const refuse = (reason) => {
  hangUp(); keepLogIn(null);
  keep("problem", reason, session); location.replace(location.pathname);
};
addEventListener("online", () => { if (state.login && !socket) connect(); });
addEventListener("offline", () => { if (socket) disconnected("offline"); });
document.addEventListener("visibilitychange", render);

// -- Drawing the chat --------------------------------------------------------------------------
const clock = new Intl.DateTimeFormat([], {timeStyle: "short"});
const moment = new Intl.DateTimeFormat([], {dateStyle: "full", timeStyle: "medium"});
const plural = (count, word) => `${count.toLocaleString()} ${word}${count === 1 ? "" : "s"}`;
const dayOf = (item) => item.day ??= new Date(item.at * 1_000).toDateString();
const dayName = (day) => {
  const ago = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(day)) / 86_400_000);
  return ["Today", "Yesterday"][ago] ?? new Date(day).toLocaleDateString([], {dateStyle: "full"});
};
const timeOf = (at, words = clock.format(at * 1_000)) => make("time",
  {dateTime: new Date(at * 1_000).toISOString(), title: moment.format(at * 1_000)}, words);
// Code in backticks, @names and links; a link ends where a sentence could, in Chinese too.
const INLINE = new RegExp("(`[^`\\n]+`|(?<![\\p{L}\\p{N}])@[\\p{L}\\p{M}\\p{N}_-]+"
  + "|https?:\\/\\/(?:\\([^\\s()]*\\)|[^\\s<>\"()（），。；：！？、「」『』《》【】])*"
  + "(?:\\([^\\s()]*\\)|[^\\s<>\"（），。；：！？、「」『』《》【】.,:;!?'()[\\]{}]))", "iu");
const marked = (text, q) => {  // what was searched for stands out
  const at = q ? text.toLowerCase().indexOf(q.toLowerCase()) : -1, end = at + q.length;
  return at < 0 ? [text]
    : [text.slice(0, at), make("mark", text.slice(at, end)), ...marked(text.slice(end), q)];
};
const inline = (text, q) => text.split(INLINE).flatMap((part, index) => {
  if (index % 2 === 0) return marked(part, q);
  if (part[0] === "`") return make("code", marked(part.slice(1, -1), q));
  if (part[0] === "@") return make("b", part);
  return make("a", {href: part, target: "_blank", rel: "noopener noreferrer"}, part);
});
const textOf = (text, q = "") => {
  const count = (letters) => text.match(letters)?.length ?? 0;
  const leftward = count(/[\p{sc=Arab}\p{sc=Hebr}\p{sc=Syrc}\p{sc=Thaa}]/gu);
  const dir = leftward * 2 > count(/\p{L}/gu) ? "rtl" : "ltr";  // of most letters, not the first
  return make("div.text", {dir}, text.split(/\n?```(?:\w*\n)?([^]+?)\n?```\n?/).flatMap(
    (part, index) => index % 2 ? make("pre", {tabIndex: 0}, marked(part, q)) : inline(part, q)));
};
const avatar = (user) => {
  const sum = [...user].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 9973, 7);
  const element = make(`span.avatar.${user === state.me ? "own" : ""}`, {ariaHidden: "true"},
    [...user][0].toUpperCase());
  element.style.setProperty("--hue", sum * 137 % 360); return element;
};
const toolsOf = ({id, user, room, text, mid, at, grouped}) => {
  const remove = ({target}) => target.replaceWith(button("Really delete?", () =>
    attempt("DELETE", `${pathOf(room)}/${id}`), ".delete"));
  return make("div.tools", grouped && timeOf(at), button("Copy", () => copy(text)),
    button("On the wire", () => showOnWire(id, mid)),
    (user === state.me || may("moderator", "admin")) && button("Delete", remove, ".delete"));
};
// `kind`: its classes; `waits`: why it is not sent yet; `q`: what was searched for.
const messageRow = cached((item, kind, waits = "", q = "") => {
  const {user, at, mid, problem, text} = item, time = clock.format(at * 1_000);
  return make(`article.message.${kind}`, {item, tabIndex: -1,
    ariaLabel: `${user}, ${moment.format(at * 1_000)}`}, avatar(user),
  make("div.who", make("button.cut", {tabIndex: -1, dir: "auto",
    onclick: ({target}) => showPerson(user, target)}, user),
  timeOf(at, q ? `${dayName(dayOf(item))} ${time}` : time),
  kind === "hit" && button("Go there", () => jump(item), ".link")),
  textOf(item.gone ? "Message deleted" : text, q), waits && make("p.state", waits,
    problem && button("Try again", () => tryAgain(item), ".link"),
    problem && button("Discard", () => settle(mid), ".link")),
  kind.includes("done") && toolsOf(item));
});
const lineRow = cached((thing, kind, text) => make(kind, text));
const listed = (people, word) => {
  const names = [...people].slice(0, 5), rest = people.size - names.length;
  if (rest > 0) names.push(`${rest} more`);
  return names.length ? [`${new Intl.ListFormat("en-GB").format(names)} ${word}`] : [];
};
const rowsOf = (room) => {
  const rows = [];
  let head = null, day = "", isMarked = room.newAfter === null;
  for (const item of [...room.items.values(), ...pendingIn(room)]) {
    const {user, at, id, joined, left, gone, problem} = item;
    const notice = joined ? [...listed(joined, "joined"), ...listed(left, "left")].join(", ")
      : item.notice;
    if (notice) rows.push(lineRow(item, item.isWrong ? "p.notice.wrong" : "p.notice", notice));
    if (!user) continue;
    const isNextDay = dayOf(item) !== day, isOwn = user === state.me;
    const isFirstNew = !isMarked && id > room.newAfter && !isOwn;
    if (isNextDay) rows.push(lineRow(item, "p.day", dayName(day = item.day)));
    if (isFirstNew) rows.push(lineRow(room, "p.new", `${room.newCount} new`));
    isMarked ||= isFirstNew;
    // What was shown with its head keeps it, or the log would jump.
    item.grouped = item.grouped !== false && !isNextDay && !isFirstNew && head?.user === user
      && at - head.at < 300;
    if (!item.grouped) head = item;
    const waits = id ? "" : problem ? `Not sent: ${problem}`
      : state.connection === "connected" ? "Sending" : "Waiting for the connection";
    item.isMention ??= !isOwn && isMention(item.text);
    const kinds = {grouped: item.grouped, gone, failed: problem, waiting: waits && !problem,
      done: id && !gone, mention: !gone && item.isMention, mayDelete: may("moderator", "admin")};
    const kind = Object.keys(kinds).filter((one) => kinds[one]).join(".");
    rows.push(messageRow(item, kind, waits));
  }
  return rows;
};
// A room opens at its first new message, or where it was left.
const arrive = (room) => {
  const line = $("messages").querySelector(".new");
  $("chatLog").scrollTop = line ? 0 : room.place; line?.scrollIntoView({block: "nearest"});
  room.place = 0; state.arriving = false;
};
const quietly = () => {  // a screen reader hears only news
  $("chatLog").ariaLive = "off";
  setTimeout(() => { $("chatLog").ariaLive = "polite"; }, 500);
};
const emptyRow = cached((room, title, words) =>
  make("div.empty", icon("mark"), make("h2", title), make("p.dim", words)));
const emptyOf = (room) => {
  const isTalk = isPrivate(room), name = isTalk ? titleOf(room) : `#${room.name}`;
  const state = room.refused ? "cannot be opened" : isTalk ? "and you" : "is new";
  return emptyRow(room, `${name} ${state}`, room.refused
    || (isTalk ? "Nobody else sees what you write here."
      : "Write the first line. All who join later will find it here."));
};
const sideRow = (sign, name, unread, badge, isCurrent, onclick) => make("li",
  make(`button.${unread ? "unread" : ""}`, {onclick, ariaCurrent: isCurrent ? "true" : null},
    make(`span.sign.${sign === "●" ? "on" : ""}`, {ariaHidden: "true"}, sign),
    make("span.cut.grow", {dir: "auto"}, name),
    unread > 0 && [make("span.count", unread), make("span.unseen", "unread")],
    !unread && badge && make("span.badge", badge)));
const roomRow = cached((room, ...shown) => sideRow(...shown, () => openRoom(room.name)));
const personRow = cached((user, role) => sideRow("●", user, 0, role.replace("member", ""), false,
  ({currentTarget}) => showPerson(user, currentTarget)), new Map());
const isOnline = (user) => [...state.rooms.values()].some((room) => room.here.has(user));
const drawSide = () => {
  const rooms = [...state.rooms.values()].filter(isListed)
    .sort((one, other) => titleOf(one).localeCompare(titleOf(other)));
  const row = (room) => roomRow(room,
    !isPrivate(room) ? "#" : isOnline(titleOf(room)) ? "●" : "○", titleOf(room), room.unread.size,
    pendingIn(room).some((item) => item.problem) ? "not sent" : "", room === state.current);
  arrange($("rooms"), rooms.filter((room) => !isPrivate(room)).map(row));
  arrange($("private"), rooms.filter(isPrivate).map(row));
  const online = new Set([...state.rooms.values()].flatMap((room) => [...room.here]));
  for (const user of [state.me, ...rooms.filter(isPrivate).map(titleOf)]) online.delete(user);
  arrange($("people"), [...online].sort().map((user) => personRow(user, roleOf(user))));
  if ($("myName").textContent !== state.me) $("myAvatar").replaceChildren(avatar(state.me));
  say("myName", state.me); say("myRole", roleOf(state.me));
  const unread = rooms.reduce((sum, room) => sum + room.unread.size, 0);
  document.title = unread ? `(${unread}) Lobby` : "Lobby";
  put("menu", {ariaLabel: `Rooms and people${unread ? `, ${unread} unread` : ""}`});
  put("menuCount", {textContent: String(unread), hidden: !unread});
  say("notifyWhy", whyNoNotices());
  put("notify", {hidden: whyNoNotices() !== "",
    textContent: isNotified() ? "Notify me no more" : "Notify me of mentions"});
};
const drawFrame = (room) => {
  const {connection, retryAt, why, search} = state, title = titleOf(room), isTalk = isPrivate(room);
  const others = [...room.here].filter((user) => user !== state.me).sort();
  say("roomName", isTalk ? title : `# ${title}`);
  say("who", isTalk ? isOnline(title) ? "online" : "away"
    : others[0] ? ["you", ...others].join(", ") : "only you");
  put("leave", {hidden: room.key === "lobby"});
  put("searching", {hidden: !search}); put("search", {ariaExpanded: String(Boolean(search))});
  say("state", connection);
  say("dot", connection === "connected" ? "●" : "○");
  const isOut = connection === "logged out", isAway = connection === "reconnecting";
  put("strip", {hidden: !isOut && !isAway});
  say("stripText", isOut ? "Your log-in has ended. What you write is kept." : isAway
    ? `No connection${why && `: ${why}`}. What you write is kept and goes out then.` : "");
  say("seconds", isAway ? `Trying again in ${Math.ceil((retryAt - Date.now()) / 1_000)} s.` : "");
  say("now", isOut ? "Log in" : "Now");
  const typing = [...room.typing].filter(([, until]) => Date.now() < until).map(([user]) => user);
  say("typing", typing.length ? `${typing.join(", ")} ${typing[1] ? "are" : "is"} typing` : "");
  const text = $("messageText").value.trim(), over = [...text].length - LONGEST;
  put("hint", {className: over > 0 ? "problem" : "", textContent: over > 0
    ? `${plural(over, "character")} too many`
    : "Enter sends, Shift + Enter breaks the line, /help"});
  put("send", {disabled: !text || over > 0});
  put("messageText", {placeholder: `Message ${isTalk ? "" : "#"}${title}`});
  const below = atNewest() ? 0 : room.unread.size;
  put("newest", {hidden: Boolean(search) || !(below || $("chatLog").scrollTop < -400),
    textContent: below ? `${below} new below` : "Jump to the newest"});
};
let drawn = null;  // the room, or the search, that was drawn last
const draw = () => {
  drawTimer = 0;
  const {me, current: room, search} = state;
  put("access", {hidden: Boolean(me)}); put("app", {hidden: !me});
  say("problem", me ? "" : state.problem || state.connection);
  if (!me) return document.title = "Lobby";
  const view = search?.found ? search : room, isNew = view !== drawn;
  const isHere = room.joined === "yes" || room.refused;
  const rows = view === search ? searchRows(search) : rowsOf(room);
  const isEmpty = view === room && isHere && !rows.some((row) => row.item);
  if (isNew) quietly();
  arrange($("messages"), isEmpty ? [emptyOf(room), ...rows] : rows);
  if (isNew && view === search) $("chatLog").scrollTop = -$("chatLog").scrollHeight;
  if (state.arriving && isHere) arrive(room);
  if (isLooking(room) && isHere) markRead(room);
  drawn = view; drawSide(); drawFrame(room); loadOlder();
  if (!$("wire").hidden) drawWire();
};

// -- Searching: messages of the room, rooms, and people who may be away, in place of the log -----
const LOOKS = {messages: "Search in this room", rooms: "Find or make a room",
  users: "Find a person"};
const openSearch = (kind, q = "") => {
  state.current.place = $("chatLog").scrollTop; state.search = {kind};
  put("query", {value: q, placeholder: LOOKS[kind], ariaLabel: LOOKS[kind]});
  $("side").hidePopover(); drawFrame(state.current); $("query").focus();
  if (q || kind !== "messages") find();
};
const endSearch = () => openRoom(state.current.name);
// Messages come by pages; `before`: what was found so far. Of names, the first fifty are enough.
const find = async (before = []) => {
  const {kind} = state.search, q = $("query").value.trim(), room = state.current;
  const search = state.search = {...state.search, q}, query = new URLSearchParams({...(q && {q}),
    ...(kind !== "users" && {limit: 50}), ...(before[0] && {before: before.at(-1).id})});
  const path = kind === "messages" ? pathOf(room.name) : kind;
  const answer = await attempt("GET", `${path}?${query}`);
  if (!answer || state.search !== search) return;
  const found = kind === "messages" ? [...before, ...answer.messages.reverse()]
    : answer.filter(({room: name = ""}) => !name.startsWith("@"));
  if (kind === "rooms" && q && !found.some((one) => one.room === keyOf(q))) found.push({isNew: q});
  state.search = {kind, q, found, more: answer.more}; draw();
};
// Shows a message in its place, or if that is long ago, among those that were written around it.
const jump = async (hit) => {
  const room = state.current, {search} = state, path = pathOf(room.name), {id} = hit;
  if (room.items.has(id)) endSearch(); else {
    const pages = await Promise.all([`before=${id}`, `after=${id - 1}`].map((where) =>
      attempt("GET", `${path}?limit=50&${where}`)));
    if (state.search !== search || !pages.every(Boolean)) return;
    const found = pages.flatMap(({messages}) => messages);
    state.search = {...search, found, more: false, isAround: true};
  }
  draw();
  const row = [...$("messages").children].find(({item}) => item?.id === id);
  row.scrollIntoView({block: "center"}); row.focus();
};
const nameRow = cached(({room, isNew, online, username, role, banned}) => make("p.found.row",
  username ? button(username, ({target}) => showPerson(username, target))
    : button(isNew ? `Make # ${isNew}` : `# ${room}`, () => openRoom(isNew ?? room)),
  make("span.small.dim", username ? (banned ? "banned" : role) : online > 0 && `${online} here`)));
const resultRow = cached(({found, more}, words) => make("p.notice.results.row",
  make("span.grow", {role: "status"}, words),
  more && button("More", () => find(found), ".link"),
  button(`Back to ${titleOf(state.current)}`, endSearch, ".link")));
const searchRows = (search) => {
  const {kind, q, found, isAround} = search, isNames = kind !== "messages";
  const words = isNames ? (found.length ? LOOKS[kind] : "No name begins so.")
    : isAround ? `“${q}”, and what was said around it`
      : `${plural(found.length, "message")} with “${q}”, newest first`;
  return [resultRow(search, words),
    ...found.map((one) => isNames ? nameRow(one) : messageRow(one, isAround ? "" : "hit", "", q))];
};

// -- What floats: a person's card, and a dialog that asks for passwords --------------------------
const article = (role) => `${role === "admin" ? "an" : "a"} ${role}`;
const RIGHTS = {member: "May write, and delete what is their own.",
  moderator: "May delete messages, kick and ban.", admin: "May do everything, this too."};
// What the reader may do with somebody: button, question, what it means, and the request for it.
const actionsOn = (user, role, banned) => [
  ["Kick", `Kick ${user}`, "Ends all open sockets; may come back.", "POST", "kick"],
  banned ? ["Unban", `Unban ${user}`, "May log in again.", "POST", "unban"]
    : ["Ban", `Ban ${user}`, "Out until somebody lifts the ban.", "POST", "ban"],
  ...Object.keys(RIGHTS).filter((one) => may("admin") && one !== role).map((one) =>
    [`Make ${one}`, `Make ${user} ${article(one)}`, RIGHTS[one], "PUT", "role", {role: one}])];
const act = async (user, title, method, what, json) => {
  $("person").hidePopover();
  await api(method, `users/${encodeURIComponent(user)}/${what}`, json); note(`${title}: done.`);
};
// A button that turns into the question whether to do it.
const askingButton = (user, [label, title, consequence, ...how]) => {
  const no = button("No", () => question.replaceWith(row), ".quiet");
  const yes = button(title, () => act(user, title, ...how).catch(complain),
    /^(Make|Unban)/.test(label) ? ".main" : ".wrong");
  const question = make("div.ask", make("b", `${title}?`), make("p.small.dim", consequence),
    make("p.row", yes, no));
  const row = button(label, () => { row.replaceWith(question); no.focus(); });
  return row;
};
const showPerson = async (user, anchor) => {
  const title = `Set ${user}'s password`, setPassword = () => askPasswords(title,
    "All log-ins of theirs end.", {"New password": "new-password"}, title,
    (fresh) => act(user, title, "PUT", "password", {new: fresh}));
  const show = (role, banned) => {
    const where = banned ? "banned" : isOnline(user) ? "online" : "away";
    const mayAct = user !== state.me && may("moderator", "admin");
    $("person").replaceChildren(make("div.row", avatar(user), make("p.grow", make("b", user),
      make("br"), make("span.small.dim", `${role}, ${where}`))),
    button("Message", () => { $("person").hidePopover(); openRoom(privateWith(user)); }),
    ...(mayAct ? actionsOn(user, role, banned).map((one) => askingButton(user, one)) : []),
    mayAct && may("admin") ? button("New password", setPassword) : "");
    put("person", {ariaLabel: user}); $("person").togglePopover({force: true, source: anchor});
  };
  show(roleOf(user), false);
  const found = await attempt("GET", `users?q=${encodeURIComponent(user)}`) ?? [];
  const one = found.find(({username}) => username === user);
  if (!one || $("person").ariaLabel !== user) return;
  state.roles.set(user, one.role); show(one.role, one.banned);
};
// A dialog with one field for each of `labels`, by what a browser may fill in.
const askPasswords = (title, why, labels, yes, action, no = "Cancel", refuse = () => {}) => {
  const problem = make("p.problem", {role: "alert"}), close = () => $("dialog").close();
  const fields = Object.entries(labels).map(([label, autocomplete]) =>
    make("label", label, make("input", {type: "password", autocomplete})));
  const form = make("form", make("div", make("h2", {id: "dialogTitle"}, title),
    make("p.small.dim", why)), fields, problem, make("p.row", make("button.main.grow", yes),
    button(no, () => { close(); refuse(); }, ".quiet")));
  onSubmit(form, problem, async () => {
    await action(...fields.map(({lastChild}) => lastChild.value)); close();
  });
  $("dialog").replaceChildren(form);
  if (!$("dialog").open) $("dialog").showModal();
};
const askAgain = () => askPasswords(`Your log-in has ended, ${state.me}`,
  `${state.why}. What you typed is kept.`, {Password: "current-password"}, "Log in again",
  (password) => logIn(state.me, password, state.login.stay), "Log out", logOut);
const changePassword = () => askPasswords("Change password",
  "Every other log-in of yours ends. The tabs of this browser go on.",
  {"Password now": "current-password", "New password": "new-password"}, "Change",
  async (old, fresh) => {
    enter((await api("PUT", "me/password", {old, new: fresh})).access_token, state.login.stay);
    note("The password is changed.");
  });

// -- What people do ----------------------------------------------------------------------------
const LONGEST = 4_000;  // characters of a message
const HELP = `/msg bob hi     says hi to bob alone
/join tea       opens a room
/who            who is here
/search words   finds messages in this room
//word          says "/word"`;
// What a form does: one thing at a time; what goes wrong is told in `problem`.
const onSubmit = (form, problem, action) => form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (form.ariaBusy) return;
  form.ariaBusy = "true"; problem.textContent = "";
  try { await action(event); } catch (error) { problem.textContent = error.message; }
  form.ariaBusy = null;
});
onSubmit($("credentials"), $("problem"), async ({submitter}) => {
  const stay = $("stay").checked, fields = [$("username"), $("password")];
  const [username, password] = fields.map(({value}) => value);
  const tell = (field, words) => {
    say(`${field.id}Problem`, words); field.ariaInvalid = String(words !== "");
  };
  state.problem = "";
  for (const field of fields) tell(field, "");
  try {
    if (submitter?.value === "register") await api("POST", "register", {username, password});
    await logIn(username, password, stay);
  } catch ({message, status, field}) {
    const wrong = $(field ?? {401: "password", 409: "username"}[status]);
    if (!fields.includes(wrong)) return Object.assign(state, {problem: message});
    tell(wrong, message); wrong.focus();
  }
});
onSubmit($("pasted"), $("problem"), () => enter($("token").value.trim(), false));
const logOut = async () => {
  await attempt("POST", "logout");
  if (state.login) refuse("Logged out");  // also when the server cannot be asked
};
on("logOut", "click", logOut);
on("changePassword", "click", () => { $("myMenu").hidePopover(); changePassword(); });
on("notify", "click", async () => {
  const wish = !isNotified() && await Notification.requestPermission() === "granted";
  keep(`notify.${state.me}`, wish || null); $("myMenu").hidePopover(); render();
});
const COMMANDS = [  // what a line may look like, and what it does
  [/^\/msg\s+(\S+)\s+([^]+)/, (user, words) => post(openRoom(privateWith(user)), words)],
  [/^\/join\s+([^]+)/, openRoom],
  [/^\/who$/, () => note(`Here: ${[...state.current.here].sort().join(", ")}`)],
  [/^\/search\s+([^]+)/, (q) => openSearch("messages", q)],
  [/^\/help$/, () => note(HELP)],
  [/^\/(\/[^]*)|^([^/][^]*)/, (slashed, text) => post(state.current, slashed ?? text)],
];
on("composer", "submit", (event) => {
  const text = $("messageText").value.trim(), room = state.current;
  event.preventDefault();
  if (!text || [...text].length > LONGEST) return;
  const [is, run] = COMMANDS.find(([is]) => is.test(text)) ?? [];
  if (!is) return note("Error: unknown command; /help lists them", true);
  run(...text.match(is).slice(1));
  if (state.current === room) $("messageText").value = "";
  keep(draftOf(room), null); render();
});
on("messageText", "keydown", (event) => {  // 229: Safari's Enter that accepts a candidate
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault(); $("composer").requestSubmit();
});
let typedAt = 0;
on("messageText", "input", ({target: {value}}) => {
  const room = state.current;
  keep(draftOf(room), value || null);
  render();
  if (!value || value[0] === "/" || room.joined !== "yes" || Date.now() - typedAt < 3_000) return;
  typedAt = Date.now(); transmit({type: "typing", room: room.name});
});
const loadOlder = () => {
  const room = state.current, log = $("chatLog"), before = oldestOf(room);
  const above = log.scrollHeight - log.clientHeight + log.scrollTop;
  if (above > 200 || !room.more || room.loading || room.joined !== "yes" || state.search) return;
  room.loading = true; transmit({type: "history", room: room.name, before});
};
on("chatLog", "keydown", ({key, target}) => {  // arrows go from message to message
  const row = target.closest(".message"), next = {ArrowUp: "previous", ArrowDown: "next"}[key];
  if (next) (row?.[`${next}ElementSibling`] ?? $("messages").lastElementChild)?.focus();
});
on("chatLog", "scroll", render);
on("newest", "click", () => { $("chatLog").scrollTop = 0; $("messageText").focus(); });
on("leave", "click", () => leaveRoom(state.current));
on("now", "click", () => state.connection === "logged out" ? askAgain() : connect());
on("search", "click", () => state.search ? endSearch() : openSearch("messages"));
on("moreRooms", "click", () => openSearch("rooms"));
on("morePeople", "click", () => openSearch("users"));
on("query", "input", () => { if (state.search.kind !== "messages") find(); });
onSubmit($("searching"), $("hint"), async () => {
  await find();
  if (state.search) $("messages").querySelector(".found button")?.click();  // a name, the first
});
on("wire", "keydown", ({key}) => { if (key === "Escape") $("closeWire").click(); });
on("searching", "keydown", ({key}) => { if (key === "Escape") endSearch(); });

// -- The wire explains: what each entry is ------------------------------------------------------
const REQUESTS = [  // by first line and status, the first that fits
  [/^POST \/login 200/, "The password goes up as JSON, a signed token comes back."],
  [/ 401$/, "{detail}. It wants a valid token."],
  [/ 422$/, "Well formed, not valid. The answer names the field."],
  [/ 4\d\d$/, "Refused: {detail}."],
  [/ 5\d\d$/, "The server's fault: try again."],
  [/ -1$/, "No answer came: no server, or no network."],
  [/ 0$/, "Waiting for the answer."],
  [/ 204$/, "Done. 204 has no body; the others hear of it by an event."],
  [/./, "{chapter} answers{about}."],
];
const FRAMES = {  // by direction and type of a frame's last event
  "in welcome": "The server speaks first: you are {user}, {role}.",
  "in history": "The last {messages}, in one frame.",
  "in presence": "Who is here: {people}.",
  "in joined": "{user} came into {room}. A notice: told, not stored.",
  "in left": "{user} has left {room}: no socket is open there any more.",
  "in message": "{user} wrote. Everybody in {room} gets this very frame.",
  "in own": "The same with id {id}: it is on disk. This is the receipt.",
  "in typing": "{user} is typing: announced to the room, never stored.",
  "in deleted": "Message {id} is gone. Every open page takes it out.",
  "in role": "{user} is {role} from now on. Only an admin may do this.",
  "in error": "Refused: {message}. {then}",
  "out message": "A text frame: no headers, {bytes} B, to everybody in {room}.",
  "out typing": "You are typing: told at most every 3 s, never stored.",
  "out join": "One more room on this socket: {room}, after id {after}.",
  "out leave": "No more of {room} on this socket, please.",
  "out history": "Scrolling up: please the messages before id {before}.",
  "in other": "A text frame: what the route of this socket answers.",
  "out other": "A text frame of {bytes} B. It has no headers: the handshake had them.",
};
const CLOSES = {1000: "closed on purpose. Both sides agree, nothing is lost.",
  1001: "the server goes away. It is tried again.", 1003: "binary, where only text is taken.",
  1005: "closed without a code. Both sides agree, nothing is lost.",
  1006: "no closing frame; the line broke, or the door was shut before 101.",
  1008: "not allowed any more. The reason given: {reason}.",
  1009: "your frame was larger than the server takes.",
  1012: "the server restarts. It is tried again.",
  1013: "you read too slowly, or it is busy. It is tried again."};
const SOCKETS = {"/ws": 3, "/ws-endpoint": 3, "/ws/json": 3, "/ws/inspect": 3, "/ws/protected": 7,
  "/ws/chat": 10, "/ws/{session_id}": 4};  // their chapters, as /openapi.json tells of no sockets
// /openapi.json tells which chapter answers, by its tags, and what a route does.
const learnOperations = async () => {
  const {paths = {}} = await api("GET", "openapi.json").catch(() => ({}));
  const routes = Object.entries(paths).flatMap(([path, methods]) => Object.entries(methods)
    .map(([method, {tags, description}]) => ({method: method.toUpperCase(), path, tag: tags?.[0],
      about: description?.split(/[.;](\s|$)/)[0].replaceAll("`", "")})));
  const sockets = Object.entries(SOCKETS).map(([path, chapter]) => ({method: "WS", path,
    tag: routes.find(({tag}) => tag?.startsWith(`${chapter}.`))?.tag ?? String(chapter)}));
  state.operations = [...routes, ...sockets].filter(({tag}) => tag).map((one) => ({...one,
    pattern: new RegExp(`^${one.path.replace(/\{[^}]+\}/g, "[^/]+")}${
      one.path === "/inspect" ? "(/.*)?" : ""}$`)}));
  const names = Object.keys({...paths, ...SOCKETS});
  $("paths").replaceChildren(...names.map((value) => make("option", {value})));
  render();
};
const operationOf = (method, path) => state.operations.find((one) =>
  one.pattern.test(path.split("?")[0]) && (one.method === method || one.path === "/inspect"));
const chapterOf = (one) => one ? `chapter ${one.tag.replace(". ", ", ")}` : "the server";
const fill = (words, values) => words.replace(/{(\w+)}/g, (_, name) => values[name] ?? "…");
const SENTENCES = {
  http: ({method, path, title, status, text, bytes = 0}) => {
    const operation = operationOf(method, path), [, words] =
      REQUESTS.find(([is]) => is.test(`${title} ${status}`));
    return fill(words, {detail: parsed(text)?.detail,
      chapter: chapterOf(operation).split(",")[0].replace(/^./, (one) => one.toUpperCase()),
      about: operation?.about ? `: ${operation.about}` : ` with ${plural(bytes, "byte")}`});
  },
  open: ({status, picked}) =>
    !status ? "A GET that asks to become a socket: Upgrade, a key, perhaps subprotocols."
      : "101: the connection stops being HTTP here."
        + (picked ? ` Subprotocol ${picked} was picked.` : ""),
  close: (entry) => `${entry.code}: ${fill(CLOSES[entry.code] ?? "closed.", entry)}`,
  frame: ({way, types, texts, bytes}) => {
    const said = parsed(texts.at(-1).split("\n").at(-1)), isOwn = said?.user === state.me;
    const type = isOwn && said.type === "message" ? "own" : said?.type;
    const words = FRAMES[`${way} ${type}`] ?? FRAMES[`${way} other`], wait = said?.retry_after;
    return (types.length > 1 ? `${types.length} events, one frame. ` : "") + fill(words, {...said,
      bytes, after: said?.after ?? "any", role: article(said?.role),
      messages: plural(said?.messages?.length ?? 0, "message"),
      people: plural(Object.keys(said?.users ?? {}).length, "person").replace("persons", "people"),
      then: wait ? `It is sent again in ${wait} s.` : "The socket stays open."});
  },
};
const sentenceOf = (entry) => SENTENCES[entry.kind](entry);

// -- Drawing the wire --------------------------------------------------------------------------
// Lines as JSON, in which short lists are on a line; keys, strings and numbers stand out.
const pretty = (value) => JSON.stringify(value, null, 2).replace(/[[{][^[\]{}]{0,70}[\]}]/g,
  (list) => list.replace(/\n\s*/g, " "));
const coloured = (line) => {
  const value = parsed(line), parts = value === undefined ? [line] : pretty(value).slice(0, 20_000)
    .split(/("(?:[^"\\]|\\.)*"(?:: )?|\b\d[\d.eE+-]*\b)/);
  return [...parts.map((part, index) => index % 2 === 0 ? part
    : make(part.endsWith('": ') ? "b" : part[0] === '"' ? "i" : "em", part)), "\n"];
};
const section = (title, aside, headers = [], text = "") => make("section",
  make("h3", title, make("span", aside)), make("dl", headers.flatMap(([name, value]) =>
    [make("dt", name), make("dd", hideSecrets(value))])),
  text && make("pre", {tabIndex: 0}, text.split("\n").flatMap(coloured)));
// A page can read neither what a browser adds nor a 101's headers: only if the server tells it.
const addedTo = ({kind, seen, text, headers}) => {
  const echo = seen ?? parsed(text), own = new Set(headers.map((pair) => pair.join(": ")));
  if (!echo?.http_version) return section("Added by the browser", "hidden from scripts",
    (kind === "open" ? ["host", "origin", "connection", "upgrade", "sec-websocket-key"]
      : ["host", "user-agent", "accept"]).map((name) => [name, "…"]));
  const added = echo.headers.filter(([name, value]) => !own.has(`${name}: ${hideSecrets(value)}`));
  return section("Added by the browser",
    `${plural(added.length, "header")}, as the server saw them`, added);
};
const curlOf = ({kind, method, path, headers, body}) => {
  const quote = (text) => `'${text.replace(/eyJ\S*…/g, "TOKEN").replaceAll("'", "'\\''")}'`;
  const upgrade = kind === "http" ? [] : [["connection", "Upgrade"], ["upgrade", "websocket"],
    ["sec-websocket-version", "13"], ["sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="]];
  return [`curl -i -X ${method} ${quote(location.origin + path)}`,
    ...[...headers, ...upgrade].map((pair) => `-H ${quote(pair.join(": "))}`),
    ...(body ? [`--data-raw ${quote(body)}`] : [])].join(" \\\n  ");
};
const copy = (text) => navigator.clipboard?.writeText(text)
  ?? note("Without https the browser lets no page copy.", true);
const frameSection = ({code, way, bytes, texts}) => {
  const head = (bytes < 126 ? 2 : bytes < 65_536 ? 4 : 10) + (way === "out" ? 4 : 0);
  const size = `${bytes} B, and a head of ${head}${way === "out" ? ", 4 of it the mask" : ""}`;
  return section(code ? "Close frame" : "Payload", size, [], texts.join("\n"));
};
const cardOf = (entry) => {
  const {kind, way, title, headers, body, status, reason, answered, text, at, again} = entry;
  const exact = `${at.toTimeString().slice(0, 8)}.${String(at.getMilliseconds()).padStart(3, "0")}`;
  return make("div.card", make("div.row.small",
    headers && button("Copy as curl", () => copy(curlOf(entry)), ".link"),
    again && button("Send again", () => again().catch(() => {}), ".link"), make("time", exact)),
  way ? frameSection(entry) : [section("Request", title, headers, body), addedTo(entry),
    section("Answer", status > 0 ? `${status} ${reason}` : "none", answered, text)]);
};
const chipOf = ({kind, status, code, count, event}) => {
  if (kind === "frame") return event?.type === "error" ? [event.code, "warn"]
    : [count > 1 ? `× ${count}` : "", ""];
  if (kind === "close")
    return [code, [1006, 1008, 1009].includes(code) ? "bad" : code === 1013 ? "warn" : ""];
  if (status < 1) return status ? ["failed", "bad"] : ["…", ""];
  const colours = {1: "switch", 2: "good", 5: "bad"};
  return [status, colours[String(status)[0]] ?? "warn"];
};
const previewOf = ({kind, event, types, texts}) => kind !== "frame" ? ""
  : types.length ? event?.text?.slice(0, 80) ?? event?.user ?? "" : texts.at(-1).slice(0, 80);
const entryRow = cached((entry, chip, colour, ms, bytes, sentence, opened = false) => {
  const {kind, title, way = "", lane, through = [], socket} = entry, isClose = kind === "close";
  const number = (value, unit, kind = "") => make(`span.number${kind}`,
    value === undefined ? "" : `${Math.round(value).toLocaleString()} ${unit}`);
  const details = make("details", {open: opened}, make("summary", make("span.head",
    make("span.unseen", {in: "received: ", out: "sent: "}[way]), make("b.cut", title),
    chip && make(`span.chip.${colour}`, chip), make("span.preview.cut", previewOf(entry)),
    number(ms, "ms", ".ms"), number(bytes, "B"), make("span.turn")),
  make("span.sentence", sentence)), opened && cardOf(entry));
  const isOpened = way && socket?.entry.status !== 0;  // else the door was shut before 101
  details.ontoggle = () => {
    if (details.open !== opened) showEntry(entry, "nearest", details.open);
  };
  const isFresh = !entry.isDrawn;
  entry.isDrawn = true;
  return make(`li.entry.${way}.${lane === 1 ? "second" : ""}.${isFresh ? "fresh" : ""}`,
    through.map((one) => make(one ? "span.pass.second" : "span.pass")),
    isOpened && make(`span.pass.own.${isClose ? "last" : ""}`),
    way ? make(`span.node.frame.${isClose ? "square" : ""}.${colour}`, icon(way))
      : make("span.node.ring"), details);
});
const rowOf = (entry) =>
  entryRow(entry, ...chipOf(entry), entry.ms, entry.bytes, sentenceOf(entry), entry.opened);
const drawWire = () => {
  const {entries, pausedAt, tried} = state, method = $("method").value;
  const wanted = $("filter").value.toLowerCase(), isSocket = method === "WS";
  const until = entries.filter(({at}) => !pausedAt || at <= pausedAt);
  const found = until.filter((entry) => [entry.title, entry.status, entry.text, entry.body,
    sentenceOf(entry), ...entry.texts ?? []].join(" ").toLowerCase().includes(wanted));
  arrange($("list"), found.map(rowOf));
  put("pause", {ariaPressed: String(pausedAt !== null),
    textContent: pausedAt ? `Paused, ${entries.length - until.length}` : "Pause"});
  say("chapter", `Answered by ${chapterOf(operationOf(method, $("path").value))}`);
  say("go", !isSocket ? "Send" : tried ? "Close" : "Open");
  put("socketRow", {hidden: !isSocket});
  put("sendFrame", {disabled: tried?.readyState !== WebSocket.OPEN});
};

// -- The wire's form ---------------------------------------------------------------------------
const showWire = (open) => {
  const isWhole = open && matchMedia("(max-width: 700px)").matches;  // it covers the screen
  $("wire").hidden = !open; $("wireButton").ariaExpanded = String(open);
  $("room").inert = isWhole; $("try").open = !isWhole;
  if (open && !state.operations.length) learnOperations();
  render();
};
on("wireButton", "click", () => showWire($("wire").hidden));
on("closeWire", "click", () => { showWire(false); $("wireButton").focus(); });
on("clear", "click", () => { state.entries = []; render(); });
on("explain", "click", ({target}) => { target.ariaPressed = target.ariaPressed !== "true"; });
on("pause", "click", () => { state.pausedAt = state.pausedAt ? null : new Date(); render(); });
const showEntry = (entry, block, opened = true) => {  // what is open stays in sight
  entry.opened = opened; drawWire();
  if (opened && $("frames").scrollTop > -1) $("frames").scrollTop = -1;
  rowOf(entry).scrollIntoView({block});
};
const showOnWire = (id, mid) => {
  const entry = state.entries.findLast(({texts = []}) => texts.some((text) =>
    text.includes(`"id":${id},`) || (mid && text.includes(`"mid":"${mid}"`))));
  showWire(true); $("filter").value = "";
  if (entry) showEntry(entry, "center"); else note("It is not among what the wire still shows.");
};
on("wire", "input", render);
on("method", "change", ({target: {value}}) => {
  const isSocket = value === "WS", path = $("path");
  if (isSocket !== path.value.startsWith("/ws"))
    path.value = isSocket ? "/ws/json" : path.defaultValue;
});
const pairs = (lines, sign) => lines.split("\n").filter((line) => line.includes(sign)).map((line) =>
  [line.slice(0, line.indexOf(sign)).trim(), line.slice(line.indexOf(sign) + 1).trim()]);
// The body of the form and its type: a file, JSON, or lines as a form; browsers send none with GET.
const bodyOf = (method) => {
  const text = $("body").value.trim(), [file] = $("file").files, data = new FormData();
  if (/GET|HEAD/.test(method) || !(text || file)) return [];
  if (parsed(text) !== undefined) return [text, "application/json"];
  if (!file) return [String(new URLSearchParams(pairs(text, "="))),
    "application/x-www-form-urlencoded"];
  data.append("file", file); return [data];  // the browser adds the type and the boundary
};
const trySocket = async () => {
  if ($("path").value === "/ws/{session_id}") {
    $("path").value = `/ws/${(await api("POST", "create-session")).session_id}`;
  }
  const url = socketUrl($("path").value), {token} = state.login;
  if ($("withToken").checked || url.pathname === "/ws/protected")
    url.searchParams.set("token", token);
  state.tried = openSocket(url);  // which draws the page as it opens and closes
  state.tried.onclose = () => { state.tried = null; };
};
onSubmit($("form"), $("formProblem"), async ({submitter}) => {
  const method = $("method").value, {tried} = state, [body, type] = bodyOf(method);
  $("frames").scrollTop = 0;
  if (method === "WS" && !tried) return trySocket();
  if (method === "WS") return submitter === $("go") && document.activeElement !== $("frameText")
    ? tried.close() : sendFrame(tried, $("frameText").value);  // Enter there presses the first
  const headers = pairs($("headers").value, ":");
  if (type) headers.unshift(["Content-Type", type]);
  if ($("withToken").checked) headers.push(["Authorization", `Bearer ${state.login.token}`]);
  const {entry} = await request(method, $("path").value, headers, body);
  showEntry(entry, "start");
});

// -- The start: the log-in page shows what a log-in is going to put on the wire ------------------
const JSON_TYPE = [["content-type", "application/json"]];
const sample = [{kind: "http", method: "POST", path: "/login", title: "POST /login", status: 200,
  reason: "OK", ms: 212, bytes: 437, headers: JSON_TYPE, answered: JSON_TYPE,
  body: '{"username":"mira","password":"…"}',
  text: '{"access_token":"eyJhbGciOi…","token_type":"bearer","expires_in":3600}'},
{kind: "open", method: "GET", path: "/ws/chat", title: "GET /ws/chat", status: 101, ms: 4,
  picked: "lobby.v1", headers: [["sec-websocket-protocol", "lobby.v1, bearer.eyJhbGciOi…"]]},
frameOf("in", '{"type":"welcome","user":"mira","role":"member"}', 2),
frameOf("in", '{"type":"history","room":"lobby","messages":[{"id":1040},{"id":1041}]}', 5),
frameOf("out", '{"type":"message","room":"lobby","text":"大家好","mid":"k3-9f"}'),
frameOf("in", '{"type":"message","id":1042,"room":"lobby","user":"sara","text":"大家好"}', 9),
frameOf("in", '{"type":"typing","room":"lobby","user":"jonas"}'),
{kind: "close", way: "in", title: "close", code: 1000, bytes: 2, texts: ["1000"]}];
$("sample").append(...sample.map((entry) => rowOf(Object.assign(entry, {at: new Date()}))));
const DEMO = {user1: "password1", user2: "password2", admin: "adminpassword"};
$("demo").hidden = !["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
$("demo").lastElementChild.append(...Object.keys(DEMO).map((name) => button(name, () => {
  $("username").value = name; $("password").value = DEMO[name];
  $("credentials").requestSubmit();
}, ".quiet")));
state.login = kept("login", null, session) ?? kept("login");
state.problem = kept("problem", "", session); keep("problem", null, session);
if (state.login) connect(); else render();
